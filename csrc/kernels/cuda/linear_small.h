// The forward of a few rows in one kernel, as linear.cu starts it.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace dynquant::cuda {

// The longest row of x that linear_small's threads hold in registers.
constexpr int64_t linear_small_k(int64_t m, bool rotated) { return m == 1 ? 4096 : rotated ? 1024 : 2048; }

// Whether linear_small takes such a product: at most 4 rows, which start at multiples of 16 bytes and are held in
// registers; k in one part; no more blocks than run at once, since each quantizes x anew. A graph would replay two
// launches in 0 to 0.6 us less; eagerly a launch costs the host more than that.
inline bool linear_small_can(const Linear& args, const GemmPlan& plan, const Device& device) {
  const Rows& x = args.x;
  const bool x_aligned =
      reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.k * element_size(x.dtype) % 16 == 0;
  return plan.kernel == GemmKernel::kSmall && x.m <= 4 && plan.parts == 1 && x_aligned &&
         x.k <= linear_small_k(x.m, x.rotation_block > 1) &&
         plan.tiles({x.m, args.n, x.k}) <= 2 * device.multiprocessors;
}

// `output` without scale and zero_point, which are found on the way.
// `overlap`: it may start before the kernel before it has ended.
cudaError_t linear_small(const Linear& args, const Output& output, bool overlap, cudaStream_t stream);

}  // namespace dynquant::cuda
