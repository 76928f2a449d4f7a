// GEMM with few rows of q, which the previous kernel has quantized.
#include "gemm_small.cuh"

namespace dynquant::cuda {

cudaError_t gemm_small(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                       cudaStream_t stream) {
  if (plan.tile_m == 8) return launch_small<Mma<8>>(args, plan, partial, overlap, stream);
  if (plan.tile_m == 16) return launch_small<Mma<16>>(args, plan, partial, overlap, stream);
  return launch_small<Mma<32>>(args, plan, partial, overlap, stream);
}

}  // namespace dynquant::cuda
