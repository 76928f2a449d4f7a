// Interface of the GEMM kernels to linear.cu.
#pragma once

#include "kernels.h"

namespace dynquant::cuda {

// The output matrix and its dequantization; the formula is in epilogue.cuh.
struct Output {
  void* data;   // [m, n]
  Dtype dtype;  // kInt32: bare accumulators; only m and n of the fields below are read
  int64_t m;
  int64_t n;
  const float* scale;         // [m], or [1] with row_stride 0
  const int32_t* zero_point;  // as scale
  int row_stride;
  const float* weight_scale;  // [n]
  const int32_t* weight_sum;  // [n]
  const void* bias;           // [n] of bias_dtype, or null
  Epilogue function;
  Dtype bias_dtype;
};

struct Gemm {
  const int8_t* q;       // [m, row_bytes], aligned to 16 bytes, zeros beyond k
  const int8_t* weight;  // [n, row_bytes], likewise
  int64_t row_bytes;     // padded_k(k)
  int64_t m;
  int64_t n;
  int64_t k;
  Output output;
};

// Workspace for the parts of k; null with a single part.
struct PartialSums {
  int32_t* counters;  // one per tile, 0 at the start
  int32_t* sums;      // [parts, m, n]
};

cudaError_t gemm_small(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                       cudaStream_t stream);
cudaError_t gemm_mma(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                     cudaStream_t stream);
cudaError_t gemm_wgmma(const Gemm& args, const GemmPlan& plan, const Device& device, bool overlap,
                       cudaStream_t stream);

// Runs the plan's kernel. `workspace`: workspace_bytes(), with counters of 0. `overlap`: the previous kernel
// lets this one start early.
cudaError_t gemm(const Gemm& args, const GemmPlan& plan, const Device& device, void* workspace, bool overlap,
                 cudaStream_t stream);

}  // namespace dynquant::cuda
