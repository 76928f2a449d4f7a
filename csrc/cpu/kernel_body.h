// The body of every kernel, written once over the vector type V (vector_*.h) and the dot product Dot of an
// instruction set. Each of scalar.cpp, avx2.cpp, ... includes it inside a namespace and target region of its own, so
// nothing here may call an inline function from outside: it could be compiled with instructions that not every CPU has.

using F = V::F;
using I = V::I;
constexpr int W = V::kLanes;
constexpr int kChunk = 4 * W;  // elements that the quantizers handle at a time

#define DYNQUANT_INLINE inline __attribute__((always_inline))
#define DYNQUANT_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

template <typename T>
F load_part(const T* p, int64_t count) {  // zeros beyond count
  T lanes[W] = {};
  __builtin_memcpy(lanes, p, count * sizeof(T));
  return V::load(lanes);
}

template <typename T>
void store_part(T* p, F x, int64_t count) {
  T lanes[W];
  V::store(lanes, x);
  __builtin_memcpy(p, lanes, count * sizeof(T));
}

#include "quantize_body.h"
#include "gemm_body.h"

constexpr Kernels make_kernels(const char* name, double gops) {
  return Kernels{name,
                 gops,
                 operand_stride,
                 min_max,
                 rotate,
                 quantize,
                 quantize_per_token,
                 quantize_per_tensor,
                 operand_from_int8,
                 gemm_scratch,
                 linear,
                 int8_mm,
                 weight_range,
                 quantize_weight};
}
