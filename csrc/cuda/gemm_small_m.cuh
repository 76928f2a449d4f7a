// GEMM for few rows of q: bound by reading the weights, so each weight byte is read once, from global memory straight
// into the registers of the one thread that needs it.
//
// A block owns kTileN rows of the weight (output channels) and kTileM rows of q, and its 8 warps take turns along k.
// In a step a warp reads 64 * kSteps bytes of each of the weight's rows; lane (g = lane/4, t = lane%4) holds
//
//                k:  0 ... 15 | 16 ... 31 | 32 ... 47 | 48 ... 63 |  64 ...
//   weight row g         t=0  |    t=1    |    t=2    |    t=3    |  t=0 of the next 64
//              g+8       t=0  |    t=1    |    t=2    |    t=3    |
//   q row      g         t=0  |    t=1    |    t=2    |    t=3    |        (mma; with dp4a: every row)
//
// which is, up to the order of k (and a sum does not depend on it), the operand layout of mma.m16n8k32 as well.
// Then the warps' sums meet in shared memory:  sums[warp][q row][weight row].
#pragma once

#include "epilogue.cuh"
#include "launch.h"
#include "unaligned.cuh"

namespace dynquant::cuda {

constexpr int kSmallThreads = 256;
constexpr int kSmallWarps = kSmallThreads / 32;

// Dot: what multiplies. Sums of kTileM x kTileN outputs, spread over the lanes of a warp:
//   kSteps: 64 k each that are loaded ahead              kRowsOfQ: rows of q that a lane loads, q_row(i, lane)
//   multiply(weight vectors, q vectors)                  store(shared sums [kTileM][kTileN], lane)
//   kResident: blocks that a multiprocessor shall hold at least
template <class Dot>
__global__ void __launch_bounds__(kSmallThreads, Dot::kResident)
    gemm_small_kernel(const Gemm a, const int64_t k_of_part, const int parts, const PartialSums partial,
                      const bool weight_aligned, const unsigned tiles_n) {
  constexpr int kSteps = Dot::kSteps;
  constexpr int kRows = Dot::kTileN / 8;
  constexpr int kSpan = 64 * kSteps;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  // Both in x: the other dimensions of a grid end at 65,535.
  const int64_t n = blockIdx.x % tiles_n * int64_t{Dot::kTileN};
  const int64_t m = blockIdx.x / tiles_n * int64_t{Dot::kTileM};
  const int part = blockIdx.y;
  const int64_t end = min(a.k, (part + 1) * k_of_part);
  const int8_t* const weight_end = a.weight + a.n * a.k;

  const auto load_weights = [&](int64_t k, uint4(&w)[kSteps][kRows]) {
    const auto load_each = [&](const auto& load) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int64_t row = n + 8 * i + lane / 4;
          const int64_t column = k + 64 * step + lane % 4 * 16;
          const bool inside = row < a.n && column < end;
          w[step][i] = inside ? load(a.weight + row * a.k + column) : make_uint4(0, 0, 0, 0);
        }
      }
    };
    if (weight_aligned) {
      load_each([](const int8_t* source) { return ptx::load_once(source); });
    } else {
      load_each([&](const int8_t* source) { return load_unaligned(source, a.weight, weight_end); });
    }
  };

  Dot dot = {};
  uint4 w[kSteps][kRows];
  int64_t k = part * k_of_part + warp * kSpan;
  load_weights(k, w);  // these never come from the kernel before
  ptx::wait_for_previous_kernel();
  for (; k < end; k += kSmallWarps * kSpan) {
    uint4 next[kSteps][kRows];
    load_weights(k + kSmallWarps * kSpan, next);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint4 q[Dot::kRowsOfQ];
#pragma unroll
      for (int i = 0; i < Dot::kRowsOfQ; ++i) {
        const int64_t row = m + Dot::q_row(i, lane);
        const int64_t column = k + 64 * step + lane % 4 * 16;
        q[i] = make_uint4(0, 0, 0, 0);
        if (row < a.m && column < end) {
          q[i] = *reinterpret_cast<const uint4*>(a.q + row * a.q_row_bytes + column);
        }
      }
      dot.multiply(w[step], q);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        w[step][i] = next[step][i];
      }
    }
  }

  constexpr int kTile = Dot::kTileM * Dot::kTileN;
  int32_t* const sums = ptx::dynamic_shared<int32_t>();
  dot.store(sums + warp * kTile, lane);
  __syncthreads();
  const auto sums_at = [&](int row, int group, int32_t (&values)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      values[i] = 0;
      for (int of_warp = 0; of_warp < kSmallWarps; ++of_warp) {
        values[i] += sums[of_warp * kTile + row * Dot::kTileN + group * kGroup + i];
      }
    }
  };
  finish_tile<kSmallThreads, Dot::kTileM, Dot::kTileN>(a.output, m, n, parts, part, blockIdx.x,
                                                       partial.counters, partial.sums, sums_at);
}

template <class Dot>
cudaError_t launch_small(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                         cudaStream_t stream) {
  const GemmShape shape = {args.m, args.n, args.k, true};
  Launch how{dim3(static_cast<unsigned>(plan.tiles(shape)), static_cast<unsigned>(plan.parts)), kSmallThreads,
             kSmallWarps * Dot::kTileM * Dot::kTileN * sizeof(int32_t)};
  how.overlap = overlap;
  return launch(gemm_small_kernel<Dot>, how, stream, args, plan.k_of_part, plan.parts, partial,
                is_aligned_weight(args), static_cast<unsigned>(plan.tiles_n(shape)));
}

}  // namespace dynquant::cuda
