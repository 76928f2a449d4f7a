// GEMM with few rows of q. Reading the weight bounds it, so each weight byte is read once, from global memory
// straight into the registers of the one thread that multiplies it.
//
// A block owns kTileN rows of the weight (output channels) and kTileM rows of q; its 8 warps interleave along
// k. In a step a warp reads 64 * kSteps bytes of each weight row; lane (g = lane/4, t = lane%4) holds
//
//                k:  0 ... 15 | 16 ... 31 | 32 ... 47 | 48 ... 63 |  64 ...
//   weight row g         t=0  |    t=1    |    t=2    |    t=3    |  t=0 of the next 64
//              g+8       t=0  |    t=1    |    t=2    |    t=3    |
//   q row      g         t=0  |    t=1    |    t=2    |    t=3    |
//
// This is the operand layout of mma.m16n8k32 with k permuted, which leaves the sum unchanged.
// The warps' sums are added in shared memory:  sums[warp][q row][weight row].
#pragma once

#include "epilogue.cuh"
#include "launch.h"

namespace dynquant::cuda {

constexpr int kSmallThreads = 256;
constexpr int kSmallWarps = kSmallThreads / 32;

// Dot (Mma below): the product of a step. Its sums of kTileM x kTileN outputs are spread over a warp's lanes:
//   kSteps: steps of 64 k per load                        kQRows: rows of q per lane, q_row(i, lane)
//   multiply(weight vectors, q vectors)                   store(shared sums [kTileM][kTileN], lane)
template <class Dot>
struct SmallShared {
  static constexpr int kTile = Dot::kTileM * Dot::kTileN;

  ColumnQParams<Dot::kTileN> columns;
  int32_t sums[kSmallWarps][kTile];

  // Adds the sums of all warps into sums[0]. Every thread of the block calls this, after a barrier.
  __device__ __forceinline__ void add_warps() {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile; i += kSmallThreads) {
      int32_t sum = 0;
#pragma unroll
      for (int warp = 0; warp < kSmallWarps; ++warp) sum += sums[warp][i];
      sums[0][i] = sum;
    }
  }

  __device__ __forceinline__ void load(int row, int group, int32_t (&values)[kGroup]) const {
    load_group(sums[0] + row * Dot::kTileN + group * kGroup, values);
  }
};

// Sums up products of the weight's rows from n on with rows of q, over k = begin ... end-1, into
// shared.sums[0], and loads the columns' qparams; both are visible to all threads afterwards. prepare_q()
// runs while the first weights are in flight; load_q(i, k) returns 16 bytes of the lane's i-th row of q, with
// k counted from begin.
template <class Dot, class PrepareQ, class LoadQ>
__device__ __forceinline__ void sum_small_tile(const Gemm& a, int64_t n, int64_t begin, int64_t end,
                                               SmallShared<Dot>& shared, const PrepareQ& prepare_q,
                                               const LoadQ& load_q) {
  constexpr int kSteps = Dot::kSteps;
  constexpr int kRows = Dot::kTileN / 8;
  constexpr int kSpan = 64 * kSteps;
  constexpr int kStride = kSmallWarps * kSpan;
  using Weights = uint4[kSteps][kRows];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  // k counts from `begin` and fits 32 bits: no part is longer than kMaxPartOfK. Rows beyond the last one read
  // the last one again; their sums are not written.
  const int length = static_cast<int>(end - begin);
  const int lane_k = lane % 4 * 16;
  const int8_t* weight_rows[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    weight_rows[i] = a.weight + min(n + 8 * i + lane / 4, a.n - 1) * a.row_bytes + begin + lane_k;
  }
  const auto load_weights = [&](int k, Weights& w) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const bool inside = k + 64 * step + lane_k < length;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        w[step][i] = inside ? ptx::load_once(weight_rows[i] + k + 64 * step) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  Dot dot = {};
  const auto multiply = [&](int k, const Weights& w) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = k + 64 * step + lane_k;
      uint4 q[Dot::kQRows];
#pragma unroll
      for (int i = 0; i < Dot::kQRows; ++i) {
        q[i] = column < length ? load_q(i, column) : make_uint4(0, 0, 0, 0);
      }
      dot.multiply(w[step], q);
    }
  };

  // Two sets of registers alternate: while one is multiplied, loads fill the other. Copying a set would wait
  // for its loads.
  Weights even, odd;
  int k = warp * kSpan;
  load_weights(k, even);  // the previous kernel never writes weights
  load_weights(k + kStride, odd);
  fetch_columns<kSmallThreads>(a.output, n, threadIdx.x, &shared.columns);
  ptx::copy_async_commit();
  prepare_q();
#pragma unroll 1
  for (; k < length; k += 2 * kStride) {
    multiply(k, even);
    load_weights(k + 2 * kStride, even);
    multiply(k + kStride, odd);
    load_weights(k + 3 * kStride, odd);
  }
  dot.store(shared.sums[warp], lane);
  ptx::copy_async_wait<0>();
  __syncthreads();  // all warps have stored their sums, and the columns' qparams have arrived
  shared.add_warps();
  __syncthreads();
}

// mma.sync with weight rows as the 16 rows of the instruction and q rows as its 8 columns. One row of q takes
// as long as 8: the time is that of loading the weight.
template <int kTileM_>
struct Mma {
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileN = 16;
  static constexpr int kQRows = kTileM / 8;
  static constexpr int kSteps = kTileM == 32 ? 1 : 2;

  int32_t sums[kTileN / 16][kQRows][4];

  static __device__ __forceinline__ int q_row(int i, int lane) { return 8 * i + lane / 4; }

  __device__ __forceinline__ void multiply(const uint4 (&w)[kTileN / 8], const uint4 (&q)[kQRows]) {
#pragma unroll
    for (int i = 0; i < kTileN / 16; ++i) {
      const uint4 &upper = w[2 * i], &lower = w[2 * i + 1];
      // Each lane's first two words serve as k 4t ... 4t+3 and 16+4t ... of one instruction, its last two of
      // the next.
      const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
      const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int j = 0; j < kQRows; ++j) {
        ptx::mma_16x8x32(sums[i][j], first, q[j].x, q[j].y);
        ptx::mma_16x8x32(sums[i][j], second, q[j].z, q[j].w);
      }
    }
  }

  __device__ __forceinline__ void store(int32_t* shared, int lane) {
#pragma unroll
    for (int i = 0; i < kTileN / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kQRows; ++j) {
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

// q is in global memory, quantized by the previous kernel.
template <class Dot>
__global__ void __launch_bounds__(kSmallThreads, 2)
    gemm_small_kernel(const __grid_constant__ Gemm a, const int64_t k_of_part, const int parts,
                      const PartialSums partial, const unsigned tiles_n) {
  // Both tile indices are in x: the other dimensions of a grid are limited to 65,535.
  const int64_t n = blockIdx.x % tiles_n * int64_t{Dot::kTileN};
  const int64_t m = blockIdx.x / tiles_n * int64_t{Dot::kTileM};
  const int part = blockIdx.y;
  const int64_t begin = part * k_of_part;
  auto& shared = *ptx::dynamic_shared<SmallShared<Dot>>();
  const int8_t* q_rows[Dot::kQRows];
#pragma unroll
  for (int i = 0; i < Dot::kQRows; ++i) {
    q_rows[i] = a.q + min(m + Dot::q_row(i, threadIdx.x % 32), a.m - 1) * a.row_bytes + begin;
  }
  sum_small_tile<Dot>(a, n, begin, min(a.k, begin + k_of_part), shared, ptx::wait_for_previous_kernel,
                      [&](int i, int k) { return *reinterpret_cast<const uint4*>(q_rows[i] + k); });
  finish_tile<kSmallThreads, Dot::kTileM, Dot::kTileN>(
      a.output, m, n, parts, part, blockIdx.x, partial.counters, partial.sums, shared.columns,
      [&](int row, int group, int32_t (&values)[kGroup]) { shared.load(row, group, values); });
}

template <class Dot>
cudaError_t launch_small(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                         cudaStream_t stream) {
  const GemmShape shape = {args.m, args.n, args.k};
  Launch spec{dim3(static_cast<unsigned>(plan.tiles(shape)), static_cast<unsigned>(plan.parts)),
              kSmallThreads, sizeof(SmallShared<Dot>)};
  spec.overlap = overlap;
  return launch<gemm_small_kernel<Dot>>(spec, stream, args, plan.k_of_part, plan.parts, partial,
                                        static_cast<unsigned>(plan.tiles_n(shape)));
}

}  // namespace dynquant::cuda
