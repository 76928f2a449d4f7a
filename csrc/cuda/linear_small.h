// The forward of a few rows in one kernel, as linear.cu starts it.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace dynquant::cuda {

// Whether linear_small takes such a product: k in one part, rows of x that start at multiples of 16 bytes, and q small
// enough for several blocks a multiprocessor.
inline bool linear_small_can(const Linear& args, const GemmPlan& plan) {
  const bool x_aligned =
      reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0 && args.x.k * size_of(args.x.dtype) % 16 == 0;
  return plan.kernel == GemmKernel::kSmallDp4a && plan.parts == 1 && x_aligned &&
         args.x.m * padded_k(args.x.k) <= 64 * 1024;
}

// `output` without scale and zero_point, which are found on the way.
cudaError_t linear_small(const Linear& args, const Output& output, cudaStream_t stream);

}  // namespace dynquant::cuda
