// GEMM by mma.sync. cp.async fills several stages of shared memory with tiles of q and of the weight.
//
// A block of 4 warps computes kTile x kTile outputs; each warp a quarter of them, in pieces of 16 x 8:
//
//                 columns = rows of the weight                    one piece of a warp (mma.m16n8k32)
//              +-----------+-----------+                             column 2t, 2t+1 (t = lane%4)
//              |  warp 0   |  warp 1   |                             +--------------+
//   rows of q  |           |           |                       row g |    c0, c1    |  (g = lane/4)
//              +-----------+-----------+                             |              |
//              |  warp 2   |  warp 3   |                     row g+8 |    c2, c3    |
//              |           |           |                             +--------------+
//              +-----------+-----------+
//
// Shared memory, 64 bytes of k a row (shared_layout.h):
//
//   stage 0: q [kTile][64], weight [kTile][64] | stage 1 | ... | qparams of the columns
//
// At the end of k the sums [kTile][kTile + 8] replace the stages; a thread reads 8 neighbouring sums at once
// (the padding keeps the warp's 8-byte stores in different banks).
#include "epilogue.cuh"
#include "launch.h"
#include "shared_layout.h"

namespace dynquant::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kStepK = 64;
constexpr int kBand = 8;

template <int kTile>
struct Shared {
  static constexpr int kOperand = kTile * kStepK;
  static constexpr int kStage = 2 * kOperand;
  // A small tile needs as many bytes in flight as a large one.
  static constexpr int kStages = 64 * 1024 / kStage;
  static constexpr int kSumsPerRow = kTile + 8;
  static constexpr int kColumns = std::max<int>(kStages * kStage, kTile* kSumsPerRow * sizeof(int32_t));
  static constexpr int kBytes = kColumns + sizeof(ColumnQParams<kTile>);
};

template <int kTile>
__global__ void __launch_bounds__(kThreads, kTile == 64 ? 3 : 2)
    gemm_mma_kernel(const __grid_constant__ Gemm a, const uint32_t tiles_m, const uint32_t tiles_n,
                    const int64_t k_of_part, const int parts, const PartialSums partial) {
  using Layout = Shared<kTile>;
  constexpr int kStages = Layout::kStages;
  constexpr int kWarpTile = kTile / 2;
  constexpr int kPiecesM = kWarpTile / 16;
  constexpr int kPiecesN = kWarpTile / 8;
  int8_t* const shared = ptx::dynamic_shared<int8_t>();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const TileIndex tile = tile_at(blockIdx.x, tiles_m, tiles_n, kBand);
  const int64_t m = int64_t{tile.m} * kTile;
  const int64_t n = int64_t{tile.n} * kTile;
  const int part = blockIdx.y;
  const int64_t begin = part * k_of_part;
  const int64_t end = min(a.k, begin + k_of_part);
  const int steps = end > begin ? static_cast<int>((end - begin + kStepK - 1) / kStepK) : 0;
  auto& columns = *reinterpret_cast<ColumnQParams<kTile>*>(shared + Layout::kColumns);

  // Thread i copies chunk i%4 of the rows i/4, i/4 + 32 ...
  const int chunk = threadIdx.x % 4;
  const auto fetch = [&](const int8_t* rows, int64_t first, int64_t count, int step, int place) {
    int8_t* const target = shared + step % kStages * Layout::kStage + place;
    const int64_t k = begin + step * kStepK + chunk * 16;
#pragma unroll
    for (int i = 0; i < kTile; i += kThreads / 4) {
      const int row = i + threadIdx.x / 4;
      const bool inside = first + row < count && k < end;
      const int8_t* const source = inside ? rows + (first + row) * a.row_bytes + k : rows;
      ptx::copy_async(target + offset_in_rows_of_64(row, chunk), source, inside);
    }
  };
  const auto fetch_q = [&](int step) { fetch(a.q, m, a.m, step, 0); };
  const auto fetch_weight = [&](int step) { fetch(a.weight, n, a.n, step, Layout::kOperand); };

  int32_t sums[kPiecesM][kPiecesN][4] = {};
  const int warp_m = warp / 2 * kWarpTile;
  const int warp_n = warp % 2 * kWarpTile;
  const auto multiply = [&](int step) {
    const int8_t* const q = shared + step % kStages * Layout::kStage;
    const int8_t* const weight = q + Layout::kOperand;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 of the 64 k: chunks 2*half and 2*half + 1
      uint32_t q_fragments[kPiecesM][4];
      uint32_t weight_fragments[kPiecesN / 2][4];
      // Matrices: rows 0-7 and 8-15 of the first chunk, then of the second.
#pragma unroll
      for (int i = 0; i < kPiecesM; ++i) {
        ptx::load_matrices(q_fragments[i],
                           q + offset_in_rows_of_64(warp_m + 16 * i + lane % 16, 2 * half + lane / 16));
      }
#pragma unroll
      for (int i = 0; i < kPiecesN / 2; ++i) {  // matrices: rows 0-7 of both chunks, then rows 8-15
        ptx::load_matrices(weight_fragments[i],
                           weight + offset_in_rows_of_64(warp_n + 16 * i + lane / 16 * 8 + lane % 8,
                                                         2 * half + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kPiecesM; ++i) {
#pragma unroll
        for (int j = 0; j < kPiecesN; ++j) {
          ptx::mma_16x8x32(sums[i][j], q_fragments[i], weight_fragments[j / 2][j % 2 * 2],
                           weight_fragments[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  };

  // The previous kernel never writes the weight or its qparams.
  fetch_columns<kThreads>(a.output, n, threadIdx.x, &columns);
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch_weight(step);
  }
  ptx::wait_for_previous_kernel();
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch_q(step);
    ptx::copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage has arrived, and no thread still reads the one that is filled next
    const int ahead = step + kStages - 1;
    if (ahead < steps) {
      fetch_weight(ahead);
      fetch_q(ahead);
    }
    ptx::copy_async_commit();
    multiply(step);
  }
  ptx::copy_async_wait<0>();
  __syncthreads();

  int32_t* const tile_sums = reinterpret_cast<int32_t*>(shared);
#pragma unroll
  for (int i = 0; i < kPiecesM; ++i) {
#pragma unroll
    for (int j = 0; j < kPiecesN; ++j) {
      int32_t* const place =
          tile_sums + (warp_m + 16 * i + lane / 4) * Layout::kSumsPerRow + warp_n + 8 * j + lane % 4 * 2;
      *reinterpret_cast<int2*>(place) = make_int2(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<int2*>(place + 8 * Layout::kSumsPerRow) = make_int2(sums[i][j][2], sums[i][j][3]);
    }
  }
  __syncthreads();
  const auto sums_at = [&](int row, int group, int32_t (&values)[kGroup]) {
    load_group(tile_sums + row * Layout::kSumsPerRow + group * kGroup, values);
  };
  finish_tile<kThreads, kTile, kTile>(a.output, m, n, parts, part, int64_t{tile.n} * tiles_m + tile.m,
                                      partial.counters, partial.sums, columns, sums_at);
}

template <int kTile>
cudaError_t launch_mma(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                       cudaStream_t stream) {
  const GemmShape shape = {args.m, args.n, args.k};
  Launch spec{dim3(static_cast<unsigned>(plan.tiles(shape)), static_cast<unsigned>(plan.parts)), kThreads,
              Shared<kTile>::kBytes};
  spec.overlap = overlap;
  return launch<gemm_mma_kernel<kTile>>(spec, stream, args, static_cast<uint32_t>(plan.tiles_m(shape)),
                                        static_cast<uint32_t>(plan.tiles_n(shape)), plan.k_of_part,
                                        plan.parts, partial);
}

}  // namespace

cudaError_t gemm_mma(const Gemm& args, const GemmPlan& plan, const PartialSums& partial, bool overlap,
                     cudaStream_t stream) {
  if (plan.tile_m == 128) return launch_mma<128>(args, plan, partial, overlap, stream);
  return launch_mma<64>(args, plan, partial, overlap, stream);
}

}  // namespace dynquant::cuda
