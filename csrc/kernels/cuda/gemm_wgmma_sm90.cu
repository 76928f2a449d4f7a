// GEMM by wgmma, for compute capability 9.0: TMA fills a ring of stages in shared memory; one warp of a block
// only starts these copies, two warpgroups multiply. Blocks are persistent: each processes tile after tile.
//
// Two blocks (a cluster) compute neighbouring tiles. Pairs along m share the weight, pairs along n share q:
// each block copies half of the shared operand to both.
//
//                     kTileN rows of the weight                   warpgroup's 64 x kTileN accumulators
//              +-----------------------------+                      columns 8j + 2t, + 1  (t = lane%4)
//   block 0    | warpgroup 0   64 rows of q  |                      +--------------------+
//              | warpgroup 1   64 rows       |             row 16w+g| c[4j], c[4j+1]     |  w = warp%4
//              +-----------------------------+                      |                    |  g = lane/4
//   block 1    | warpgroup 0                 |                 + 8  | c[4j+2], c[4j+3]   |
//  (along m)   | warpgroup 1                 |                      +--------------------+
//              +-----------------------------+
//
// Shared memory of a block; a row is 128 bytes of k, swizzled (shared_layout.h):
//
//   stage 0: q [128][128], weight [kTileN][128] | stage 1 | ... | a slice for each of the 8 warps
//   | qparams of the columns, twice for each warpgroup | filled, emptied [kStages]
//
// filled[s] ends a phase when this block's producer has announced the stage's bytes and all have arrived;
// emptied[s] when the 16 consumer warps of both blocks have read the stage: both producers write into it.
#include <algorithm>

#include "epilogue.cuh"
#include "launch.h"
#include "shared_layout.h"
#include "tensor_map.h"

namespace dynquant::cuda {
namespace {

constexpr int kCluster = kWgmmaCluster;
constexpr int kTileM = kWgmmaTileM;
constexpr int kStepK = 128;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kBand = 8;  // pairs of tiles along m
constexpr int kWarpRows = 16;

// Two ways to write a warp's 16 x kTileN sums through its slice of shared memory: AnyStore for all outputs,
// RowStore<dtype>, a third of the instructions, for function none or relu and rows at multiples of 16 bytes.
struct AnyStore;
template <Dtype kDtype>
struct RowStore;

constexpr int kSliceColumns = 32;  // columns of accumulators that AnyStore writes at a time; rows are padded
constexpr int kSliceRow = kSliceColumns + 8;
constexpr int kSliceBytes = kWarpRows * kSliceRow * sizeof(int32_t);
constexpr int kMaxRowBytes = 128;  // bytes of a row that RowStore writes at a time
static_assert(kWarpRows * kMaxRowBytes <= kSliceBytes && kSliceBytes % 128 == 0);

template <int kTileN>
struct Shared {
  static constexpr int kQ = kTileM * kStepK;
  static constexpr int kWeight = kTileN * kStepK;
  static constexpr int kStage = kQ + kWeight;
  static constexpr int kStages = 192 * 1024 / kStage;
  static constexpr int kSlices = kStages * kStage;
  static constexpr int kColumns = kSlices + kConsumerWarps * kSliceBytes;
  static constexpr int kBarriers = kColumns + 4 * sizeof(ColumnQParams<kTileN>);
  static constexpr int kBytes = kBarriers + 2 * kStages * sizeof(uint64_t);
  static_assert(kQ / kCluster % 1024 == 0 && kWeight / kCluster % 1024 == 0,
                "the swizzle repeats every 1024 bytes");
  static_assert(kBytes <= 227 * 1024, "shared memory of a block");
};

// The next stage of the ring, and the parity of its phase.
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
  uint32_t rows;  // rows of tiles, or of pairs of tiles
  uint32_t columns;
  bool pairs_along_m;
  int steps;      // steps of kStepK
  int q_rows;     // rows of q that a block copies: its tile's, or half of them if the pair shares them
  int box_bytes;  // bytes that arrive for a stage
};

// The place of a warp's sums in the output.
struct WarpTile {
  int64_t m;  // the first row
  int64_t n;
  QParams rows[2];  // of rows lane/4 and lane/4 + 8
  int lane;
  int8_t* slice;
};

// ---- from sums to outputs ----

struct AnyStore {
  // Writes 32 columns to shared memory, reads them back as 8 neighbouring columns of a row per lane.
  template <int kTileN>
  static __device__ __forceinline__ void write(const Output& output, const WarpTile& tile,
                                               const ColumnQParams<kTileN>& tile_columns,
                                               const int32_t (&sums)[kTileN / 2]) {
    int32_t* const slice = reinterpret_cast<int32_t*>(tile.slice);
    const int lane = tile.lane;
    const int group = lane % 4 * kGroup;
#pragma unroll 1
    for (int number = 0; number < kTileN / kSliceColumns; ++number) {
#pragma unroll
      for (int same = 0; same < kTileN / kSliceColumns; ++same) {
        if (same == number) {  // registers cannot be indexed at run time
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
      const int column = number * kSliceColumns + group;
      const GroupQParams columns = load_group(tile_columns, column);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4 + 8 * i;
        int32_t values[kGroup];
        load_group(slice + row * kSliceRow + group, values);
        write_outputs(output, tile.m + row, tile.n + column, compensate(values, tile.rows[i], columns),
                      tile.rows[i], columns);
      }
      __syncwarp();  // the slice has been read
    }
  }
};

// Two neighbouring columns.
struct TwoColumns {
  float scale[2];
  int32_t sum[2];
  float bias[2];
};

template <int kTileN>
__device__ __forceinline__ TwoColumns two_columns(const ColumnQParams<kTileN>& tile_columns, int column) {
  TwoColumns two;
  memcpy(two.scale, __builtin_assume_aligned(tile_columns.scale + column, 8), 8);
  memcpy(two.sum, __builtin_assume_aligned(tile_columns.sum + column, 8), 8);
  memcpy(two.bias, __builtin_assume_aligned(tile_columns.bias + column, 8), 8);
  return two;
}

template <bool kRelu>
__device__ __forceinline__ float output_of(int32_t sum, const QParams& row, const TwoColumns& columns,
                                           int i) {
  const float acc = static_cast<float>(sum - row.zero_point * columns.sum[i]);
  const float y = dequantized(acc, columns.scale[i], row.scale, columns.bias[i]);
  return kRelu ? EpilogueMath<Scalar>::relu(y) : y;
}

template <Dtype kDtype>
struct RowStore {
  static constexpr bool kHalf = kDtype == Dtype::kBFloat16 || kDtype == Dtype::kFloat16;
  static constexpr int kElementBytes = kHalf ? 2 : 4;

  template <int kTileN>
  static __device__ __forceinline__ void write(const Output& output, const WarpTile& tile,
                                               const ColumnQParams<kTileN>& tile_columns,
                                               const int32_t (&sums)[kTileN / 2]) {
    if (output.function == Epilogue::kRelu) {
      write_pieces<true>(output, tile, tile_columns, sums);
    } else {
      write_pieces<false>(output, tile, tile_columns, sums);
    }
  }

 private:
  // A piece is kRowBytes of all 16 rows: written to shared memory in the sums' layout, read back as rows.
  // The 16-byte chunk c of row r is stored in the place c ^ swizzle(r): no bank conflicts on either side.
  template <int kTileN>
  struct Piece {
    static constexpr int kRowBytes = std::min(kMaxRowBytes, kTileN* kElementBytes);
    static constexpr int kColumns = kRowBytes / kElementBytes;
    static constexpr int kCount = kTileN / kColumns;
    static constexpr int kChunks = kRowBytes / 16;
    static constexpr int kRowsAtOnce = 32 / kChunks;  // rows that one store of the warp writes

    static __device__ __forceinline__ int place(int row, int chunk) {
      const int swizzle = !kHalf ? row % 4 * 2 : kChunks == 8 ? row % 8 : row / 2 % 4;
      return row * kRowBytes + (chunk ^ swizzle) * 16;
    }
  };

  template <bool kRelu, int kTileN>
  static __device__ __forceinline__ void write_pieces(const Output& output, const WarpTile& tile,
                                                      const ColumnQParams<kTileN>& tile_columns,
                                                      const int32_t (&sums)[kTileN / 2]) {
    using Piece = Piece<kTileN>;
    const int chunk = tile.lane % Piece::kChunks;
    const int first_row = tile.lane / Piece::kChunks;
    char* const first = static_cast<char*>(output.data) +
                        ((tile.m + first_row) * output.n + tile.n) * kElementBytes + chunk * 16;
    const int64_t next_rows = Piece::kRowsAtOnce * output.n * kElementBytes;
#pragma unroll
    for (int piece = 0; piece < Piece::kCount; ++piece) {
      if constexpr (kHalf) {
        halves_to_slice<kRelu>(tile, tile_columns, sums, piece);
      } else {
        words_to_slice<kRelu>(tile, tile_columns, sums, piece);
      }
      __syncwarp();
      const bool inside = tile.n + piece * Piece::kColumns + chunk * (16 / kElementBytes) < output.n;
#pragma unroll
      for (int i = 0; i < kWarpRows / Piece::kRowsAtOnce; ++i) {
        const int row = i * Piece::kRowsAtOnce + first_row;
        const uint4 v = *reinterpret_cast<const uint4*>(tile.slice + Piece::place(row, chunk));
        if (inside && tile.m + row < output.m) {
          ptx::store_16_bytes(first + i * next_rows + piece * Piece::kRowBytes, v.x, v.y, v.z, v.w);
        }
      }
      __syncwarp();  // the slice has been read
    }
  }

  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    return kDtype == Dtype::kBFloat16 ? ptx::bfloat16_pair(low, high) : ptx::half_pair(low, high);
  }

  // Two groups of 8 columns by one stmatrix: rows 0-7 and 8-15 of the first, then of the second.
  template <bool kRelu, int kTileN>
  static __device__ __forceinline__ void halves_to_slice(const WarpTile& tile,
                                                         const ColumnQParams<kTileN>& tile_columns,
                                                         const int32_t (&sums)[kTileN / 2], int piece) {
    constexpr int kGroups = Piece<kTileN>::kColumns / 8;
#pragma unroll
    for (int j = 0; j < kGroups; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int group = piece * kGroups + j + i;
        const int32_t* const c = sums + 4 * group;
        const TwoColumns columns = two_columns(tile_columns, 8 * group + tile.lane % 4 * 2);
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          words[2 * i + below] = pair(output_of<kRelu>(c[2 * below], tile.rows[below], columns, 0),
                                      output_of<kRelu>(c[2 * below + 1], tile.rows[below], columns, 1));
        }
      }
      ptx::store_matrices(tile.slice + Piece<kTileN>::place(tile.lane % 16, j + tile.lane / 16), words[0],
                          words[1], words[2], words[3]);
    }
  }

  template <bool kRelu, int kTileN>
  static __device__ __forceinline__ void words_to_slice(const WarpTile& tile,
                                                        const ColumnQParams<kTileN>& tile_columns,
                                                        const int32_t (&sums)[kTileN / 2], int piece) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int group = piece * 4 + j;
      const int32_t* const c = sums + 4 * group;
      TwoColumns columns = {};
      if constexpr (kDtype == Dtype::kFloat32) {
        columns = two_columns(tile_columns, 8 * group + tile.lane % 4 * 2);
      }
      const int chunk = 2 * j + tile.lane % 4 / 2;
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = tile.lane / 4 + 8 * below;
        int2 words = make_int2(c[2 * below], c[2 * below + 1]);
        if constexpr (kDtype == Dtype::kFloat32) {
          words.x = __float_as_int(output_of<kRelu>(words.x, tile.rows[below], columns, 0));
          words.y = __float_as_int(output_of<kRelu>(words.y, tile.rows[below], columns, 1));
        }
        *reinterpret_cast<int2*>(tile.slice + Piece<kTileN>::place(row, chunk) + tile.lane % 2 * 8) = words;
      }
    }
  }
};

// ---- the kernel ----

template <int kTileN, class Store>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_wgmma_kernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ Output output,
                      const Tiles tiles) {
  using Layout = Shared<kTileN>;
  constexpr int kStages = Layout::kStages;
  int8_t* const shared = ptx::dynamic_shared<int8_t>();
  uint64_t* const filled = reinterpret_cast<uint64_t*>(shared + Layout::kBarriers);
  uint64_t* const emptied = filled + kStages;
  const int warp = ptx::warp_number();
  const int lane = threadIdx.x % 32;
  const uint32_t rank = ptx::cluster_rank();
  const uint32_t cluster = blockIdx.x / kCluster;
  const uint32_t clusters = gridDim.x / kCluster;
  const uint32_t total = tiles.rows * tiles.columns;
  // This block's tile, in units of tiles.
  const auto tile_of = [&](uint32_t index) {
    TileIndex tile = tile_at(index, tiles.rows, tiles.columns, kBand);
    (tiles.pairs_along_m ? tile.m : tile.n) *= kCluster;
    (tiles.pairs_along_m ? tile.m : tile.n) += rank;
    return tile;
  };

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(filled + stage, 1);
      ptx::barrier_init(emptied + stage, kCluster * kConsumerWarps);
    }
    ptx::barrier_init_fence();
  }
  if (threadIdx.x == kConsumers) {
    ptx::prefetch_tensor_map(&q_map);
    ptx::prefetch_tensor_map(&weight_map);
  }
  ptx::cluster_sync();

  if (warp >= kConsumerWarps) {
    ptx::give_registers<40>();
    if (threadIdx.x == kConsumers) {
      constexpr uint16_t kBoth = (1 << kCluster) - 1;
      const int first_q = tiles.pairs_along_m ? 0 : static_cast<int>(rank) * tiles.q_rows;
      const int first_weight = tiles.pairs_along_m ? static_cast<int>(rank) * (kTileN / kCluster) : 0;
      const auto copy_weight = [&](int stage, const TileIndex& tile, int step) {
        int8_t* const weight = shared + stage * Layout::kStage + Layout::kQ + first_weight * kStepK;
        const int32_t n = static_cast<int32_t>(tile.n) * kTileN + first_weight;
        ptx::barrier_arrive_expect(filled + stage, static_cast<uint32_t>(tiles.box_bytes));
        if (tiles.pairs_along_m) {
          ptx::copy_box_to_cluster(weight, &weight_map, step * kStepK, n, filled + stage, kBoth);
        } else {
          ptx::copy_box(weight, &weight_map, step * kStepK, n, filled + stage);
        }
      };
      const auto copy_q = [&](int stage, const TileIndex& tile, int step) {
        int8_t* const q = shared + stage * Layout::kStage + first_q * kStepK;
        const int32_t m = static_cast<int32_t>(tile.m) * kTileM + first_q;
        if (tiles.pairs_along_m) {
          ptx::copy_box(q, &q_map, step * kStepK, m, filled + stage);
        } else {
          ptx::copy_box_to_cluster(q, &q_map, step * kStepK, m, filled + stage, kBoth);
        }
      };
      // The previous kernel never writes the weight.
      int early = tiles.steps < kStages ? tiles.steps : kStages;
      for (int step = 0; step < early; ++step) copy_weight(step, tile_of(cluster), step);
      ptx::wait_for_previous_kernel();
      Ring<kStages> ring;
      for (uint32_t index = cluster; index < total; index += clusters) {
        const TileIndex tile = tile_of(index);
        for (int step = 0; step < tiles.steps; ++step) {
          if (early > 0) {
            --early;
          } else {
            ptx::barrier_wait(emptied + ring.stage, ring.parity ^ 1);
            copy_weight(ring.stage, tile, step);
          }
          copy_q(ring.stage, tile, step);
          ring.advance();
        }
      }
    }
  } else {
    ptx::take_registers<232>();
    ptx::wait_for_previous_kernel();
    const int warpgroup = warp / 4;
    auto* const columns = reinterpret_cast<ColumnQParams<kTileN>*>(shared + Layout::kColumns) + 2 * warpgroup;
    const auto release = [&](int stage) {
      if (lane < kCluster) ptx::barrier_arrive_remote(emptied + stage, lane);
    };
    Ring<kStages> ring;
    int turn = 0;  // alternates between two places for columns: slower warps may still read the other
    for (uint32_t index = cluster; index < total; index += clusters) {
      const TileIndex tile = tile_of(index);
      if (int64_t{tile.m} * kTileM + warpgroup * 64 >= output.m) {  // no rows: only releases the stages
        for (int step = 0; step < tiles.steps; ++step) {
          ptx::barrier_wait(filled + ring.stage, ring.parity);
          __syncwarp();  // no lane may still wait for a stage that the first lanes release
          release(ring.stage);
          ring.advance();
        }
        continue;
      }
      WarpTile warp_tile = {};
      warp_tile.m = int64_t{tile.m} * kTileM + warp * kWarpRows;
      warp_tile.n = int64_t{tile.n} * kTileN;
      warp_tile.rows[0] = load_row(output, warp_tile.m + lane / 4);
      warp_tile.rows[1] = load_row(output, warp_tile.m + lane / 4 + 8);
      warp_tile.lane = lane;
      warp_tile.slice = shared + Layout::kSlices + warp * kSliceBytes;
      fetch_columns<kWarpgroup>(output, warp_tile.n, threadIdx.x % kWarpgroup, columns + turn);
      ptx::copy_async_commit();

      int32_t sums[kTileN / 2];
      int last = 0;
      for (int step = 0; step < tiles.steps; ++step) {
        ptx::barrier_wait(filled + ring.stage, ring.parity);
        const uint32_t q = ptx::shared_address(shared + ring.stage * Layout::kStage);
        const uint64_t q_descriptor = descriptor_of_rows_of_128(q + warpgroup * 64 * kStepK);
        const uint64_t weight_descriptor = descriptor_of_rows_of_128(q + Layout::kQ);
        ptx::keep_registers(sums);
        ptx::wgmma_fence();
#pragma unroll
        for (int part = 0; part < kStepK / 32; ++part) {  // the next 32 bytes of k: 2 units of 16
          ptx::wgmma_64xNx32<kTileN>(sums, q_descriptor + 2 * part, weight_descriptor + 2 * part,
                                     step > 0 || part > 0);
        }
        ptx::wgmma_commit();
        ptx::keep_registers(sums);
        ptx::wgmma_wait<1>();
        if (step > 0) release(last);  // only this step's products are in flight
        last = ring.stage;
        ring.advance();
      }
      ptx::wgmma_wait<0>();
      ptx::keep_registers(sums);
      release(last);

      ptx::copy_async_wait<0>();
      ptx::barrier_of_threads(1 + warpgroup, kWarpgroup);  // the columns have arrived for the whole warpgroup
      Store::template write<kTileN>(output, warp_tile, columns[turn], sums);
      turn ^= 1;
    }
  }
  // Neither block may leave while the other can still arrive at its barriers.
  ptx::cluster_sync();
}

template <int kTileN, class Store>
cudaError_t launch_wgmma(const Gemm& args, const GemmPlan& plan, const Device& device, bool overlap,
                         cudaStream_t stream) {
  const GemmShape shape = {args.m, args.n, args.k};
  const bool along_m = wgmma_pairs_along_m(plan, shape);
  Tiles tiles = {};
  tiles.rows = static_cast<uint32_t>(ceil_div(plan.tiles_m(shape), along_m ? kCluster : 1));
  tiles.columns = static_cast<uint32_t>(ceil_div(plan.tiles_n(shape), along_m ? 1 : kCluster));
  tiles.pairs_along_m = along_m;
  tiles.steps = static_cast<int>(ceil_div(args.k, kStepK));
  // At most m rows, rounded up to the 8 of a swizzle period: rows outside the matrix are slow to copy. Stale
  // data below them in a stage enters only sums that are not written.
  const int64_t rows_of_tile = std::min<int64_t>(args.m, kTileM);
  tiles.q_rows = static_cast<int>(round_up(ceil_div(rows_of_tile, along_m ? 1 : kCluster), 8));
  tiles.box_bytes = (tiles.q_rows * (along_m ? 1 : kCluster) + kTileN) * kStepK;
  const int rows_of_weight = along_m ? kTileN / kCluster : kTileN;
  CUtensorMap q_map, weight_map;
  cudaError_t error = encode_tensor_map(&q_map, args.q, args.m, args.k, args.row_bytes, tiles.q_rows);
  if (error == cudaSuccess) {
    error = encode_tensor_map(&weight_map, args.weight, args.n, args.k, args.row_bytes, rows_of_weight);
  }
  if (error != cudaSuccess) return error;
  const int64_t clusters =
      std::min<int64_t>(int64_t{tiles.rows} * tiles.columns, device.multiprocessors / kCluster);
  Launch spec{dim3(static_cast<unsigned>(clusters * kCluster)), kThreads, Shared<kTileN>::kBytes};
  spec.cluster = kCluster;
  spec.overlap = overlap;
  return launch<gemm_wgmma_kernel<kTileN, Store>>(spec, stream, q_map, weight_map, args.output, tiles);
}

// Whether RowStore supports the output.
bool has_rows_of_16_bytes(const Output& output) {
  return (output.function == Epilogue::kNone || output.function == Epilogue::kRelu) &&
         reinterpret_cast<uintptr_t>(output.data) % 16 == 0 &&
         output.n * element_size(output.dtype) % 16 == 0;
}

template <int kTileN>
cudaError_t with_store(const Gemm& args, const GemmPlan& plan, const Device& device, bool overlap,
                       cudaStream_t stream) {
  if (!has_rows_of_16_bytes(args.output)) {
    return launch_wgmma<kTileN, AnyStore>(args, plan, device, overlap, stream);
  }
  switch (args.output.dtype) {
    case Dtype::kInt32:
      return launch_wgmma<kTileN, RowStore<Dtype::kInt32>>(args, plan, device, overlap, stream);
    case Dtype::kFloat32:
      return launch_wgmma<kTileN, RowStore<Dtype::kFloat32>>(args, plan, device, overlap, stream);
    case Dtype::kBFloat16:
      return launch_wgmma<kTileN, RowStore<Dtype::kBFloat16>>(args, plan, device, overlap, stream);
    default: return launch_wgmma<kTileN, RowStore<Dtype::kFloat16>>(args, plan, device, overlap, stream);
  }
}

}  // namespace

cudaError_t gemm_wgmma(const Gemm& args, const GemmPlan& plan, const Device& device, bool overlap,
                       cudaStream_t stream) {
  if (plan.tile_n == 256) return with_store<256>(args, plan, device, overlap, stream);
  if (plan.tile_n == 128) return with_store<128>(args, plan, device, overlap, stream);
  if (plan.tile_n == 64) return with_store<64>(args, plan, device, overlap, stream);
  return with_store<32>(args, plan, device, overlap, stream);
}

}  // namespace dynquant::cuda
