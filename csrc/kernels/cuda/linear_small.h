// Interface to linear.cu: the forward pass of a few rows in one kernel.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace dynquant::cuda {

// The longest row of x that fits the registers of linear_small's threads.
constexpr int64_t linear_small_k(int64_t m, bool rotated) { return m == 1 ? 4096 : rotated ? 1024 : 2048; }

// Whether linear_small supports a product: at most 4 rows, which start at multiples of 16 bytes and fit the
// registers; k in one part; no more blocks than run concurrently, since each block quantizes x again. A graph
// would replay two launches in 0 to 0.6 us less; eagerly, the second launch costs the host more than that.
inline bool linear_small_supports(const Linear& args, const GemmPlan& plan, const Device& device) {
  const Rows& x = args.x;
  const bool x_aligned =
      reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.k * element_size(x.dtype) % 16 == 0;
  return plan.kernel == GemmKernel::kSmall && x.m <= 4 && plan.parts == 1 && x_aligned &&
         x.k <= linear_small_k(x.m, x.rotation.block > 1) &&
         plan.tiles({x.m, args.n, x.k}) <= 2 * device.multiprocessors;
}

// `output` without scale and zero_point, which the kernel computes.
// `overlap`: the kernel may start before the previous one has ended.
cudaError_t linear_small(const Linear& args, const Output& output, bool overlap, cudaStream_t stream);

}  // namespace dynquant::cuda
