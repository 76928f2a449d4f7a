// The body of every kernel, written once over the vector type V (vector_*.h) and the dot product Dot of an
// instruction set. Each of scalar.cpp, avx2.cpp, ... includes it inside a namespace and target region of its own, so
// nothing here may call an inline function from outside: it could be compiled with instructions that not every CPU has.

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

#include "cpu/generic/quantize.h"
#include "cpu/generic/gemm.h"

constexpr KernelTable make_kernels(const char* name, double gops, const KernelTable* few_rows = nullptr) {
  // Measured. 48 rows of K = 384 lie in L1 beside a panel; a gathered weight wants more rows to be worth it, and a tile of
  // 16 channels passes over them four times as often.
  constexpr int64_t kRowsAtOnce = kWidth == kBlock ? 48 : 96;
  return KernelTable{name,
                     gops,
                     few_rows,
                     Dot::kMaxRows,
                     kRowsAtOnce,
                     operand_stride,
                     plan_bytes<>,
                     min_max,
                     rotate,
                     quantize,
                     quantize_per_token,
                     quantize_per_tensor,
                     operand_from_int8,
                     gemm_scratch<>,
                     linear,
                     int8_mm,
                     weight_range,
                     quantize_weight};
}
