// AVX512-VNNI: vpdpbusd on zmm registers.
#include "cpu/isa/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernel_table.h"
#include "cpu/dot/concept.h"
#include "cpu/isa/target.h"

// GCC 12 warns about the undefined vectors inside the intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define DYNQUANT_DPBUSD _mm512_dpbusd_epi32
#define DYNQUANT_DPWSSD _mm512_dpwssd_epi32
#define DYNQUANT_DPBUSD_ASM "vpdpbusd"
#define DYNQUANT_DPBUSD_REGISTERS "v"
DYNQUANT_TARGET_BEGIN("avx2,f16c,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace dynquant::cpu {
namespace {
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_512.h"
#include "cpu/generic/prelude.h"
#include "cpu/dot/vnni.h"

struct Dot : VnniDot {
  // One row reads four panels side by side, four streams for the hardware prefetcher.
  template <int kRows>
  static constexpr int kVectors = kRows == 1 ? 16 : 4;

  static constexpr int64_t kGroupsOfKBlock = 0;  // K is not blocked

  static void store_activations(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    _mm512_storeu_si512(p, _mm512_xor_si512(V::bytes(q0, q1, q2, q3), _mm512_set1_epi8(-128)));
  }
};

#include "cpu/generic/kernels.h"
}  // namespace

extern const KernelTable kAvx512Vnni = make_kernels("avx512vnni", 420.0);
}  // namespace dynquant::cpu

DYNQUANT_TARGET_END
#endif
