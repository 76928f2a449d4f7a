// AVX-VNNI: vpdpbusd on ymm registers in its VEX encoding, for CPUs without AVX-512.
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "target.h"

#define DYNQUANT_DPBUSD _mm256_dpbusd_avx_epi32
#define DYNQUANT_DPWSSD _mm256_dpwssd_avx_epi32
#define DYNQUANT_DPBUSD_ASM "%{vex%} vpdpbusd"
#define DYNQUANT_DPBUSD_REGISTERS "x"
DYNQUANT_TARGET_BEGIN("avx2,f16c,avxvnni")

namespace dynquant::cpu {
namespace {
#include "bfloat16.h"
#include "vector_256.h"
#include "body_begin.h"
#include "dot_vnni_256.h"
#include "kernel_body.h"
}  // namespace

extern const Kernels kAvxVnni = make_kernels("avxvnni", 300.0);
}  // namespace dynquant::cpu

DYNQUANT_TARGET_END
#endif
