// GEMM by wgmma, for compute capability 9.0: TMA fills a ring of stages in shared memory, one warp of a block does
// nothing but start these copies, two warpgroups multiply. Blocks stay and take one tile after the other.
//
// Two blocks (a cluster) compute neighbouring tiles along m and share the weight: each copies half of it, to both.
//
//                     kTileN rows of the weight                   warpgroup's 64 x kTileN accumulators
//              +-----------------------------+                      columns 8j + 2t, + 1  (t = lane%4)
//   block 0    | warpgroup 0   64 rows of q  |                      +--------------------+
//              | warpgroup 1   64 rows       |             row 16w+g| c[4j], c[4j+1]     |  w = warp%4
//              +-----------------------------+                      |                    |  g = lane/4
//   block 1    | warpgroup 0                 |                 + 8  | c[4j+2], c[4j+3]   |
//              | warpgroup 1                 |                      +--------------------+
//              +-----------------------------+
//
// Shared memory of a block; a row is 128 bytes of k, swizzled (shared_layout.h):
//
//   stage 0: q [128][128], weight [kTileN][128] | stage 1 | ... | sums [8 warps][16][40] | filled, emptied [kStages]
//
// filled[s] ends a phase when this block's producer has announced the stage's bytes and all have arrived;
// emptied[s] when each of the 16 consumer warps of both blocks has read the stage: both producers write into it.
#include "epilogue.cuh"
#include "launch.h"
#include "shared_layout.h"
#include "tensor_map.h"

namespace dynquant::cuda {
namespace {

constexpr int kCluster = 2;
constexpr int kTileM = kWgmmaTileM;
constexpr int kStepK = 128;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kBand = 8;           // pairs of tiles along m
constexpr int kSliceColumns = 32;  // accumulators go through shared memory so many columns at a time
constexpr int kSliceRow = kSliceColumns + 8;
constexpr int kWarpRows = 16;

template <int kTileN>
struct Shared {
  static constexpr int kQ = kTileM * kStepK;
  static constexpr int kWeight = kTileN * kStepK;
  static constexpr int kStage = kQ + kWeight;
  static constexpr int kStages = 192 * 1024 / kStage;
  static constexpr int kSums = kStages * kStage;
  static constexpr int kBarriers = kSums + kConsumerWarps * kWarpRows * kSliceRow * sizeof(int32_t);
  static constexpr int kBytes = kBarriers + 2 * kStages * sizeof(uint64_t);
  static_assert(kQ % 1024 == 0 && kWeight / kCluster % 1024 == 0, "the swizzle repeats every 1024 bytes");
  static_assert(kBytes <= 227 * 1024, "shared memory of a block");
};

// Which stage of the ring is next, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Tiles {
  int64_t pairs;  // of tiles along m, one for each block of a cluster
  int64_t columns;
  int64_t total;
  int steps;  // of kStepK
};

template <int kTileN>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_wgmma_kernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ Output output,
                      const Tiles tiles) {
  using Layout = Shared<kTileN>;
  constexpr int kStages = Layout::kStages;
  int8_t* const shared = ptx::dynamic_shared<int8_t>();
  uint64_t* const filled = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  uint64_t* const emptied = filled + kStages;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int64_t cluster = blockIdx.x / kCluster;
  const int64_t clusters = gridDim.x / kCluster;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(filled + stage, 1);
      ptx::barrier_init(emptied + stage, kCluster * kConsumerWarps);
    }
    ptx::barrier_init_fence();
  }
  ptx::cluster_sync();
  ptx::wait_for_previous_kernel();

  if (warp >= kConsumerWarps) {
    ptx::give_registers<40>();
    if (threadIdx.x == kConsumers) {
      ptx::prefetch_tensor_map(&q_map);
      ptx::prefetch_tensor_map(&weight_map);
      constexpr int kHalf = kTileN / kCluster;
      Ring<kStages> ring;
      for (int64_t index = cluster; index < tiles.total; index += clusters) {
        const TileIndex tile = tile_at(index, tiles.pairs, tiles.columns, kBand);
        const int32_t m = static_cast<int32_t>((tile.m * kCluster + rank) * kTileM);
        const int32_t n = static_cast<int32_t>(tile.n * kTileN + rank * kHalf);
        for (int step = 0; step < tiles.steps; ++step) {
          int8_t* const q = shared + ring.stage * Layout::kStage;
          int8_t* const weight = q + Layout::kQ + rank * kHalf * kStepK;
          uint64_t* const barrier = filled + ring.stage;
          ptx::barrier_wait(emptied + ring.stage, ring.parity ^ 1);
          ptx::barrier_arrive_expect(barrier, Layout::kStage);
          ptx::copy_box(q, &q_map, step * kStepK, m, barrier);
          ptx::copy_box_to_cluster(weight, &weight_map, step * kStepK, n, barrier, (1 << kCluster) - 1);
          ring.advance();
        }
      }
    }
  } else {
    ptx::take_registers<232>();
    const int warpgroup = warp / 4;
    int32_t* const slice = reinterpret_cast<int32_t*>(shared + Layout::kSums) + warp * kWarpRows * kSliceRow;
    const auto release = [&](int stage) {
      if (lane < kCluster) ptx::barrier_arrive_remote(emptied + stage, lane);
    };
    Ring<kStages> ring;
    for (int64_t index = cluster; index < tiles.total; index += clusters) {
      const TileIndex tile = tile_at(index, tiles.pairs, tiles.columns, kBand);
      const int64_t m = (tile.m * kCluster + rank) * kTileM + warp * kWarpRows;
      const int64_t n = tile.n * kTileN;

      const int group = lane % 4 * kGroup;
      const RowQparams rows[2] = {load_row(output, m + lane / 4), load_row(output, m + lane / 4 + 8)};
      ColumnQparams next_columns = load_columns(output, n + group);
      int32_t sums[kTileN / 2];
      int last = 0;
      for (int step = 0; step < tiles.steps; ++step) {
        ptx::barrier_wait(filled + ring.stage, ring.parity);
        const uint32_t q = ptx::shared_address(shared + ring.stage * Layout::kStage);
        const uint64_t of_q = descriptor_of_rows_of_128(q + warpgroup * 64 * kStepK);
        const uint64_t of_weight = descriptor_of_rows_of_128(q + Layout::kQ);
        ptx::keep_registers(sums);
        ptx::wgmma_fence();
#pragma unroll
        for (int part = 0; part < kStepK / 32; ++part) {  // 32 bytes further along k: 2 in units of 16
          ptx::wgmma_64xNx32<kTileN>(sums, of_q + 2 * part, of_weight + 2 * part, step > 0 || part > 0);
        }
        ptx::wgmma_commit();
        ptx::keep_registers(sums);
        ptx::wgmma_wait<1>();
        if (step > 0) release(last);  // only this step's products are under way
        last = ring.stage;
        ring.advance();
      }
      ptx::wgmma_wait<0>();
      ptx::keep_registers(sums);
      release(last);

      // Each warp for itself: 32 columns to shared memory, back as 8 neighbouring ones of a row for each lane.
#pragma unroll 1
      for (int number = 0; number < kTileN / kSliceColumns; ++number) {
        const int64_t column = n + number * kSliceColumns + group;
        const ColumnQparams columns = next_columns;
        next_columns = load_columns(output, column + kSliceColumns);
#pragma unroll
        for (int same = 0; same < kTileN / kSliceColumns; ++same) {
          if (same == number) {  // registers have no run-time index
#pragma unroll
            for (int j = 0; j < kSliceColumns / 8; ++j) {
              const int32_t* const piece = sums + (same * (kSliceColumns / 8) + j) * 4;
              int32_t* const place = slice + lane / 4 * kSliceRow + 8 * j + lane % 4 * 2;
              *reinterpret_cast<int2*>(place) = make_int2(piece[0], piece[1]);
              *reinterpret_cast<int2*>(place + 8 * kSliceRow) = make_int2(piece[2], piece[3]);
            }
          }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = lane / 4 + 8 * i;
          const int4* const source = reinterpret_cast<const int4*>(slice + row * kSliceRow + group);
          const int4 low = source[0], high = source[1];
          const int32_t values[kGroup] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
          write_outputs(output, m + row, column, compensate(values, rows[i], columns), rows[i], columns);
        }
        __syncwarp();
      }
    }
  }
  // Neither block may leave while the other can still arrive at its barriers.
  ptx::cluster_sync();
}

template <int kTileN>
cudaError_t launch_wgmma(const Gemm& args, const GemmPlan& plan, const Device& device, bool overlap,
                         cudaStream_t stream) {
  CUtensorMap q_map, weight_map;
  cudaError_t error = encode_tensor_map(&q_map, args.q, args.m, args.k, args.q_row_bytes, kTileM);
  if (error == cudaSuccess) {
    error = encode_tensor_map(&weight_map, args.weight, args.n, args.k, args.k, kTileN / kCluster);
  }
  if (error != cudaSuccess) return error;
  const GemmShape shape = {args.m, args.n, args.k, true};
  Tiles tiles = {};
  tiles.pairs = ceil_div(plan.tiles_m(shape), kCluster);
  tiles.columns = plan.tiles_n(shape);
  tiles.total = tiles.pairs * tiles.columns;
  tiles.steps = static_cast<int>(ceil_div(args.k, kStepK));
  const int64_t clusters = std::min<int64_t>(tiles.total, device.multiprocessors / kCluster);
  Launch how{dim3(static_cast<unsigned>(clusters * kCluster)), kThreads, Shared<kTileN>::kBytes};
  how.cluster = kCluster;
  how.overlap = overlap;
  return launch(gemm_wgmma_kernel<kTileN>, how, stream, q_map, weight_map, args.output, tiles);
}

}  // namespace

cudaError_t gemm_wgmma(const Gemm& args, const GemmPlan& plan, const Device& device, bool overlap,
                       cudaStream_t stream) {
  if (plan.tile_n == 256) return launch_wgmma<256>(args, plan, device, overlap, stream);
  if (plan.tile_n == 128) return launch_wgmma<128>(args, plan, device, overlap, stream);
  return launch_wgmma<64>(args, plan, device, overlap, stream);
}

}  // namespace dynquant::cuda
