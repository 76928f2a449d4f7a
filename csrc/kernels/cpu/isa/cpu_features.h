// Instruction sets that the CPU has and whose registers the operating system saves.
#pragma once

namespace dynquant::cpu {

struct CpuFeatures {
  bool avx2 = false, f16c = false, fma = false, avxvnni = false, avx512 = false, avx512vnni = false;

  CpuFeatures();
};

}  // namespace dynquant::cpu
