// Up to 4 rows of q by dp4a (four int8 products and their sum in one instruction).
#include "gemm_small_m.cuh"

namespace dynquant::cuda {

cudaError_t gemm_small_dp4a(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                            cudaStream_t stream) {
  if (plan.tile_m == 1) return launch_small<Dp4a<1>>(args, plan, partial, overlap, stream);
  return launch_small<Dp4a<4>>(args, plan, partial, overlap, stream);
}

}  // namespace dynquant::cuda
