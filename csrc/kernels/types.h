// Types that the CPU and the CUDA kernels share.
#pragma once

#include <cstdint>

namespace dynquant {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kInt32 };

constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16 ? 2 : 4;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A range that holds 0: lo <= 0 <= hi; both NaN if an element was NaN.
struct Range {
  float lo;
  float hi;
};

struct QParams {
  float scale;
  int32_t zero_point;
};

// A floating-point matrix [m, k]: element (i, j) at data + (i * stride + j) elements of dtype.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t m;
  int64_t k;
  int64_t stride;      // CUDA: k
  int rotation_block;  // 0: no rotation
};

}  // namespace dynquant
