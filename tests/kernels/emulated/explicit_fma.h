// Takes the multiply-adds that the kernels write out of an object (-include): the ones that are left in its
// disassembly are contractions by the compiler. For reading, not for running.
#pragma once

#include <immintrin.h>

#define EXPLICIT_FMA(type, constraint, a, b, c)                           \
  ({                                                                      \
    type written = (a);                                                   \
    __asm__("" : "+" constraint(written) : constraint(b), constraint(c)); \
    written;                                                              \
  })
#define _mm256_fmadd_ps(a, b, c) EXPLICIT_FMA(__m256, "x", a, b, c)
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps(a, b, c) EXPLICIT_FMA(__m512, "v", a, b, c)
