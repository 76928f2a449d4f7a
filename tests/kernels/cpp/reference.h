// What the drivers compute, in plain loops: dynquant/reference/ once more, for the tests that run without Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bits.h"
#include "config.h"
#include "types.h"

namespace kernel_tests {

using dynquant::Dtype;
using dynquant::Epilogue;
using dynquant::QParams;
using dynquant::Range;
using dynquant::Rotation;

using Floats = std::vector<float>;
using Bytes = std::vector<int8_t>;

inline size_t index(int64_t i) { return static_cast<size_t>(i); }

// ---- elements of a dtype ----

// x rounded to a dtype, as bytes.
std::vector<uint8_t> encode(const Floats& x, Dtype dtype);
float decode(const uint8_t* data, int64_t i, Dtype dtype);

// ---- rows ----

// Walsh-Hadamard transform of blocks, stage by stage, without a factor.
void rotate_row(float* x, int64_t k, Rotation rotation);

Range range_of(const float* x, int64_t count);
QParams qparams_of(Range range);
int8_t quantize_value(float x, QParams qparams);

// ---- weights ----

// Scale of weights whose largest magnitude is given.
float weight_scale_of(float magnitude);
int8_t quantize_weight_value(float w, float scale);

// packed_shape's panels, zeros as padding.
Bytes pack(const Bytes& weight, int64_t n, int64_t k, int64_t panel);
std::vector<int32_t> row_sums(const Bytes& weight, int64_t n, int64_t k);

// ---- products ----

// [m][n], exact.
std::vector<int64_t> multiply(const Bytes& q, const Bytes& weight, int64_t m, int64_t n, int64_t k);

struct Forward {
  Floats x;  // [m][k], values of the dtype
  int64_t m, k, n;
  Rotation rotation;
  bool per_tensor;
  const QParams* given;
  Bytes weight;               // [n][k]
  Floats weight_scale, bias;  // bias: empty for none
  Epilogue epilogue;
};

// fp32 [m][n] before the rounding to the output's dtype.
Floats forward(const Forward& args);

float epilogue_of(Epilogue epilogue, float x);

}  // namespace kernel_tests
