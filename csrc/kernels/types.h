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

// The rotation of rows before their quantization: element k of a block is multiplied by the factor whose sign
// bit is rotation_sign(k), then the block by the Walsh-Hadamard matrix of its size.
struct Rotation {
  int block;   // 0: no rotation, else 1, 2, 4 ... 128
  bool signs;  // false in layers of files from before the signs: every factor is 1
};

constexpr Rotation kNoRotation{0, false};

constexpr bool operator==(Rotation a, Rotation b) { return a.block == b.block && a.signs == b.signs; }

// The sign bit of the factor 1 or -1 of element k of a block: the Rudin-Shapiro sequence, -1 where the binary
// digits of k hold an odd number of pairs of adjacent ones.
constexpr uint32_t rotation_sign(uint32_t k) {
  uint32_t pairs = k & (k >> 1), sign = 0;
  for (; pairs != 0; pairs >>= 1) sign ^= pairs & 1;
  return sign << 31;
}

// A floating-point matrix [m, k]: element (i, j) at data + (i * stride + j) elements of dtype.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t m;
  int64_t k;
  int64_t stride;  // CUDA: k
  Rotation rotation;
};

}  // namespace dynquant
