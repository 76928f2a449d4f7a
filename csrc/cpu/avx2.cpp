// AVX2: vpmaddubsw where it cannot saturate, wider products where it could; for few rows 16-bit products throughout.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "target.h"

DYNQUANT_TARGET_BEGIN("avx2,f16c")

namespace dynquant::cpu {
namespace {
#include "bfloat16.h"
#include "vector_256.h"
namespace few_rows {
#include "body_begin.h"
#include "dot_avx2_words.h"
#include "kernel_body.h"
}  // namespace few_rows
#include "body_begin.h"
#include "dot_avx2.h"
#include "kernel_body.h"

constexpr Kernels kFewRowsTable = few_rows::make_kernels("avx2", 150.0);
}  // namespace

extern const Kernels kAvx2 = make_kernels("avx2", 190.0, &kFewRowsTable);
}  // namespace dynquant::cpu

DYNQUANT_TARGET_END
#endif
