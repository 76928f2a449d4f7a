// The instruction sets of this build, lowest first: (name, table, required CPU features).
#pragma once

#define DYNQUANT_ISAS(ISA) ISA(scalar, kScalar, true) DYNQUANT_X86_ISAS(ISA)

#if defined(__x86_64__)
#define DYNQUANT_X86_ISAS(ISA)                                             \
  ISA(avx2, kAvx2, (cpu.avx2 && cpu.f16c && cpu.fma))                      \
  ISA(avxvnni, kAvxVnni, (cpu.avx2 && cpu.f16c && cpu.fma && cpu.avxvnni)) \
  ISA(avx512vl_vnni, kAvx512VlVnni, (cpu.avx512 && cpu.avx512vnni))        \
  ISA(avx512vnni, kAvx512Vnni, (cpu.avx512 && cpu.avx512vnni))
#else
#define DYNQUANT_X86_ISAS(ISA)
#endif
