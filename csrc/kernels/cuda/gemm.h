// The GEMM kernels as linear.cu starts them.
#pragma once

#include "kernels.h"

namespace dynquant::cuda {

// What becomes of the accumulators; epilogue.cuh is its formula.
struct Output {
  void* data;   // [m, n]
  Dtype dtype;  // kInt32: the accumulators as they are, and nothing below is read
  int64_t m;
  int64_t n;
  const float* scale;         // [m], or [1] with row_stride 0
  const int32_t* zero_point;  // as scale
  int row_stride;
  const float* weight_scale;  // [n]
  const int32_t* weight_sum;  // [n]
  const float* bias;          // [n], or null
  Epilogue function;
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

// Where the parts of k meet; null with a single part.
struct PartialSums {
  int32_t* counters;  // one for each tile, 0 before
  int32_t* sums;      // [parts, m, n]
};

cudaError_t gemm_small(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                       cudaStream_t stream);
cudaError_t gemm_mma(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                     cudaStream_t stream);
cudaError_t gemm_wgmma(const Gemm& args, const GemmPlan& plan, const Device& device, bool overlap,
                       cudaStream_t stream);

// Runs the plan's kernel. `workspace`: workspace_bytes(), its counters 0. `overlap`: the kernel before it lets it
// start early.
cudaError_t gemm(const Gemm& args, const GemmPlan& plan, const Device& device, void* workspace, bool overlap,
                 cudaStream_t stream);

}  // namespace dynquant::cuda
