// AVX-VNNI: vpdpbusd on ymm registers in its VEX encoding, for CPUs without AVX-512.
#include "cpu/isa/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernel_table.h"
#include "cpu/dot/concept.h"
#include "cpu/isa/target.h"

#define DYNQUANT_DPBUSD _mm256_dpbusd_avx_epi32
#define DYNQUANT_DPWSSD _mm256_dpwssd_avx_epi32
#define DYNQUANT_DPBUSD_ASM "%{vex%} vpdpbusd"
#define DYNQUANT_DPBUSD_REGISTERS "x"
DYNQUANT_TARGET_BEGIN("avx2,f16c,fma,avxvnni")

namespace dynquant::cpu {
namespace {
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_256.h"
#include "cpu/generic/prelude.h"
#include "cpu/dot/vnni_256.h"
#include "cpu/generic/kernels.h"
}  // namespace

extern const KernelTable kAvxVnni = make_kernels("avxvnni", 300.0);
}  // namespace dynquant::cpu

DYNQUANT_TARGET_END
#endif
