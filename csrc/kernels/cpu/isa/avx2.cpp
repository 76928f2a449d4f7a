// AVX2: vpmaddubsw if it cannot saturate, else wider products; 16-bit products throughout for few rows and
// for weights with -128, whose sign vpsignb cannot change.
#include "cpu/isa/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernel_table.h"
#include "cpu/dot/concept.h"
#include "cpu/isa/target.h"

DYNQUANT_TARGET_BEGIN("avx2,f16c,fma")

namespace dynquant::cpu {
namespace {
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_256.h"
namespace few_rows {
#include "cpu/generic/prelude.h"
#include "cpu/dot/avx2_words.h"
#include "cpu/generic/kernels.h"
}  // namespace few_rows
#include "cpu/generic/prelude.h"
#include "cpu/dot/avx2_pairs.h"
#include "cpu/generic/kernels.h"

constexpr KernelTable kFewRowsTable = few_rows::make_kernels("avx2", 150.0);
}  // namespace

extern const KernelTable kAvx2 = make_kernels("avx2", 190.0, &kFewRowsTable, &kFewRowsTable);
}  // namespace dynquant::cpu

DYNQUANT_TARGET_END
#endif
