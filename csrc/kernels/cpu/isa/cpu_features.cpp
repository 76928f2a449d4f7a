#include "cpu/isa/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dynquant::cpu {

CpuFeatures::CpuFeatures() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return;
  const bool has_f16c = (c & bit_F16C) != 0, has_fma = (c & bit_FMA) != 0;
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  const bool saves_ymm = (saved & 0x6) == 0x6, saves_zmm = (saved & 0xe6) == 0xe6;
  if (!saves_ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  f16c = has_f16c;
  fma = has_fma;
  avx2 = (b & bit_AVX2) != 0;
  const unsigned avx512_bits = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  avx512 = saves_zmm && has_f16c && has_fma && (b & avx512_bits) == avx512_bits;
  avx512vnni = (c & (1u << 11)) != 0;
  const unsigned subleaves = a;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avxvnni = (a & (1u << 4)) != 0;
#endif
}

}  // namespace dynquant::cpu
