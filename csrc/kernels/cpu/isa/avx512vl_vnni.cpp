// AVX512VL + VNNI: the AVX-VNNI body in its EVEX encoding, so that AVX-512 machines can test it.
#include "cpu/isa/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernel_table.h"
#include "cpu/dot/concept.h"
#include "cpu/isa/target.h"

#define DYNQUANT_DPBUSD _mm256_dpbusd_epi32
#define DYNQUANT_DPWSSD _mm256_dpwssd_epi32
#define DYNQUANT_DPBUSD_ASM "%{evex%} vpdpbusd"
#define DYNQUANT_DPBUSD_REGISTERS "v"
DYNQUANT_TARGET_BEGIN("avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512vnni")

namespace dynquant::cpu {
namespace {
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_256.h"
#include "cpu/generic/prelude.h"
#include "cpu/dot/vnni_256.h"
#include "cpu/generic/kernels.h"
}  // namespace

extern const KernelTable kAvx512VlVnni = make_kernels("avx512vl_vnni", 300.0);
}  // namespace dynquant::cpu

DYNQUANT_TARGET_END
#endif
