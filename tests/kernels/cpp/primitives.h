// The primitives of an instruction set, V and Dot, as functions on arrays: the tests need no code of its target
// region. primitives/cpu/generic/kernels.h fills a table from each isa/*.cpp.
#pragma once

#include <cstdint>

namespace kernel_tests {

constexpr int kMostLanes = 16;

// Arrays have `lanes` elements unless a comment says otherwise.
struct VectorOps {
  int lanes;

  using Binary = void (*)(const float* a, const float* b, float* out);
  using IntBinary = void (*)(const int32_t* a, const int32_t* b, int32_t* out);
  using Shift = void (*)(const int32_t* a, int32_t* out);
  using Mask = void (*)(const float* a, const float* b, bool* out);

  Binary add, sub, mul, div, min, max;
  void (*fma)(const float* a, const float* b, const float* c, float* out);
  IntBinary int_add, int_sub, int_mul, int_max, bit_and, bit_or, bit_xor;
  Shift shift_left[32], shift_right[32];  // by their index

  void (*load_bfloat16)(const uint16_t* from, float* out);
  void (*load_float16)(const uint16_t* from, float* out);
  void (*store_bfloat16)(uint16_t* to, const float* x);
  void (*store_float16)(uint16_t* to, const float* x);
  void (*broadcast)(float x, float* out);
  void (*int_broadcast)(int32_t x, int32_t* out);
  void (*as_int)(const float* x, int32_t* out);
  void (*as_float)(const int32_t* x, float* out);
  void (*round)(const float* x, int32_t* out);
  void (*convert)(const int32_t* x, float* out);
  void (*in_register)(const float* x, float* out);

  Mask less, unordered;
  // select(either(less(a, b), unordered(c, d)), yes, no), and whether any lane is set.
  bool (*select)(const float* a, const float* b, const float* c, const float* d, const float* yes,
                 const float* no, float* out);
  float (*lowest_lane)(const float* x);
  float (*highest_lane)(const float* x);
  int32_t (*sum_lanes)(const int32_t* x);
  void (*transpose)(const float* rows, float* columns);  // lanes * lanes
  void (*butterfly[4])(const float* x, float* out);      // of stride 1, 2, 4, 8; null from `lanes` on

  // Of generic/prelude.h, over V::load and V::store.
  void (*load_up_to)(const float* from, int64_t count, float* out);
  void (*store_up_to)(float* to, const float* x, int64_t count);
  void (*load_half_up_to)(const uint16_t* from, int64_t count, float* out);
  void (*store_half_up_to)(uint16_t* to, const float* x, int64_t count);

  void (*store_bytes)(int8_t* to, const int32_t* q);  // 4 * lanes
  void (*load_bytes)(const int8_t* from, int32_t* out);
};

struct DotOps {
  int max_rows;
  int32_t offset;  // of packed activations: packed value = q + offset

  bool plans;  // whether multiply_planned is there

  int (*channels)(int rows);  // of a tile of so many rows

  // acc[rows][channels(rows)] = sums over k of packed activations and weights; returns the offset of these
  // activations. q: [rows][k]; packed: one panel of channels(rows), see pack.h.
  int32_t (*multiply)(const int8_t* q, int rows, int64_t k, const int8_t* packed, int32_t* acc);
  int32_t (*multiply_planned)(const int8_t* q, int rows, int64_t k, const int8_t* packed, int32_t* acc);

  int64_t max_k;  // of subtract
  // acc - offset * sum, for offsets zero_point + offset.
  void (*subtract)(const int32_t* acc, int32_t offset, const int32_t* sum, int32_t* out);
};

struct Primitives {
  const char* name;
  const Primitives* few_rows;  // another Dot, or null
  VectorOps vector;
  DotOps dot;
};

}  // namespace kernel_tests
