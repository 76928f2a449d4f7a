// 5 to 16 rows of q by mma.sync: the weight's rows are the 16 rows of the instruction, q's the 8 columns.
#include "gemm_small_m.cuh"

namespace dynquant::cuda {
namespace {

template <int kTileM_, int kTileN_>
struct Mma {
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kRowsOfQ = kTileM / 8;
  static constexpr int kSteps = kTileN == 32 ? 1 : 2;
  static constexpr int kResident = 2;

  int32_t sums[kTileN / 16][kRowsOfQ][4];

  static __device__ __forceinline__ int q_row(int i, int lane) { return 8 * i + lane / 4; }

  __device__ __forceinline__ void multiply(const uint4 (&w)[kTileN / 8], const uint4 (&q)[kRowsOfQ]) {
#pragma unroll
    for (int i = 0; i < kTileN / 16; ++i) {
      const uint4 &upper = w[2 * i], &lower = w[2 * i + 1];
      // The instruction's k 4t ... 4t+3 and 16+4t ... are the first two words of each lane, then the last two.
      const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
      const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int j = 0; j < kRowsOfQ; ++j) {
        ptx::mma_16x8x32(sums[i][j], first, q[j].x, q[j].y);
        ptx::mma_16x8x32(sums[i][j], second, q[j].z, q[j].w);
      }
    }
  }

  __device__ __forceinline__ void store(int32_t* shared, int lane) {
#pragma unroll
    for (int i = 0; i < kTileN / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kRowsOfQ; ++j) {
#pragma unroll
        for (int l = 0; l < 4; ++l) {
          const int row_of_q = 8 * j + lane % 4 * 2 + l % 2;
          const int row_of_weight = 16 * i + lane / 4 + l / 2 * 8;
          shared[row_of_q * kTileN + row_of_weight] = sums[i][j][l];
        }
      }
    }
  }
};

}  // namespace

cudaError_t gemm_small_mma(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                           cudaStream_t stream) {
  if (plan.tile_m == 8) return launch_small<Mma<8, 16>>(args, plan, partial, overlap, stream);
  return launch_small<Mma<16, 32>>(args, plan, partial, overlap, stream);
}

}  // namespace dynquant::cuda
