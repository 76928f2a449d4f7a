// Few rows of q by dp4a (four int8 products and their sum in one instruction), on any device.
#include "gemm_small_m.cuh"

namespace dynquant::cuda {
namespace {

// Each lane multiplies its 16 k of each of its weight rows with every row of q; the four lanes of a weight row add
// up at the end.
template <int kRowsOfQ_>
struct Dp4a {
  static constexpr int kTileM = kRowsOfQ_;
  static constexpr int kTileN = 16;
  static constexpr int kRowsOfQ = kRowsOfQ_;
  static constexpr int kSteps = kRowsOfQ == 1 ? 4 : 2;
  static constexpr int kResident = kRowsOfQ <= 4 ? 2 : 1;

  int32_t sums[kTileN / 8][kRowsOfQ];

  static __device__ __forceinline__ int q_row(int i, int) { return i; }

  __device__ __forceinline__ void multiply(const uint4 (&w)[kTileN / 8], const uint4 (&q)[kRowsOfQ]) {
#pragma unroll
    for (int i = 0; i < kTileN / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kRowsOfQ; ++j) {
        int32_t sum = sums[i][j];
        sum = __dp4a(static_cast<int>(w[i].x), static_cast<int>(q[j].x), sum);
        sum = __dp4a(static_cast<int>(w[i].y), static_cast<int>(q[j].y), sum);
        sum = __dp4a(static_cast<int>(w[i].z), static_cast<int>(q[j].z), sum);
        sums[i][j] = __dp4a(static_cast<int>(w[i].w), static_cast<int>(q[j].w), sum);
      }
    }
  }

  __device__ __forceinline__ void store(int32_t* shared, int lane) {
#pragma unroll
    for (int i = 0; i < kTileN / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kRowsOfQ; ++j) {
        int32_t sum = sums[i][j];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == j % 4) shared[j * kTileN + 8 * i + lane / 4] = sum;
      }
    }
  }
};

}  // namespace

cudaError_t gemm_small_dp4a(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                            cudaStream_t stream) {
  if (plan.tile_m == 1) return launch_small<Dp4a<1>>(args, plan, partial, overlap, stream);
  if (plan.tile_m == 4) return launch_small<Dp4a<4>>(args, plan, partial, overlap, stream);
  return launch_small<Dp4a<16>>(args, plan, partial, overlap, stream);
}

}  // namespace dynquant::cuda
