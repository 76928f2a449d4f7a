// Interface of quantize.cu to linear.cu and to the single steps of kernels.h.
#pragma once

#include "kernels.h"

namespace dynquant::cuda {

constexpr int kMaxRanges = kRangeWorkspace / sizeof(Range);

// Ranges of parts of x after its rotation, at most kMaxRanges; their union is the range of x.
cudaError_t find_ranges(const Rows& x, const Device& device, Range* ranges, int* count, cudaStream_t stream);

enum class QParamsFrom : int {
  kRow,     // chosen from each row's own range; written, [m]
  kRanges,  // chosen from `ranges`, the range of all of x; written, [1]
  kGiven,   // read, [1] or [m]
  kStatic,  // read, [1]; written, [m]: NaN and 0 for a row that is not finite
};

struct QuantizeRows {
  Rows x;
  QParamsFrom from;
  const Range* ranges;
  int range_count;
  const float* given_scale;
  const int32_t* given_zero_point;
  bool given_per_row;
  // Outputs. q is [m, row_bytes], zeros beyond k.
  int8_t* q;
  int64_t row_bytes;
  float* scale;
  int32_t* zero_point;
  // If not null, the only outputs: the ranges of the rows, [m] (from is kRow).
  float* lo;
  float* hi;
  // The counters of a GEMM with several parts of k, set to 0.
  int32_t* counters;
  int64_t counter_count;
};

// `overlap`: the previous kernel lets this one start early.
cudaError_t quantize_rows(const QuantizeRows& args, const Device& device, bool overlap, cudaStream_t stream);

}  // namespace dynquant::cuda
