// The choice of GEMM kernel, tile and number of parts of k (split-K): pure functions of shape and device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace dynquant::cuda {

// The properties of a device that the choice of a kernel depends on.
struct Device {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int code;  // the architecture of the kernels' code that runs here: 80 for PTX of 8.0, on any device
};

// Rows of q and of weights are padded with zeros to a multiple of 16 bytes, the size of every kernel's loads.
constexpr int64_t padded_k(int64_t k) { return (k + 15) / 16 * 16; }

// The longest part of k for one int32 accumulator; |q - zero_point| * |weight| <= 255 * 128 allows 65,793.
constexpr int64_t kMaxPartOfK = 65536;

struct GemmShape {
  int64_t m;
  int64_t n;
  int64_t k;
};

enum class GemmKernel : int {
  kSmall,  // few rows of q: weights from global memory straight to registers, products by mma.sync
  kMma,    // tiles by mma.sync, cp.async pipeline
  kWgmma,  // tiles by wgmma, TMA pipeline: 9.0 exactly, k in one part
};

// Tiles of tile_m x tile_n outputs. `parts` blocks work on a tile, each on k_of_part of k; the last one to
// finish adds up their sums.
struct GemmPlan {
  GemmKernel kernel;
  int tile_m;
  int tile_n;
  int parts;
  int64_t k_of_part;

  constexpr int64_t tiles_m(const GemmShape& shape) const { return (shape.m + tile_m - 1) / tile_m; }
  constexpr int64_t tiles_n(const GemmShape& shape) const { return (shape.n + tile_n - 1) / tile_n; }
  constexpr int64_t tiles(const GemmShape& shape) const { return tiles_m(shape) * tiles_n(shape); }
};

// `plan` with k in `parts` parts, or more where exactness requires it; each part starts at a multiple of 256.
constexpr GemmPlan with_parts(GemmPlan plan, int64_t k, int64_t parts) {
  parts = std::max<int64_t>({parts, (k + kMaxPartOfK - 1) / kMaxPartOfK, 1});
  plan.k_of_part = std::max<int64_t>((k + parts * 256 - 1) / (parts * 256) * 256, 256);
  plan.parts = static_cast<int>(std::max<int64_t>((k + plan.k_of_part - 1) / plan.k_of_part, 1));
  return plan;
}

constexpr GemmPlan plan_small(const GemmShape& shape, const Device& device) {
  GemmPlan plan = {GemmKernel::kSmall, shape.m <= 8 ? 8 : shape.m <= 16 ? 16 : 32, 16, 1, 0};
  // A few blocks with long rows cannot saturate memory bandwidth.
  const int64_t tiles = plan.tiles(shape);
  const bool few = 2 * tiles < device.multiprocessors;
  return with_parts(plan, shape.k,
                    few ? std::min(device.multiprocessors / std::max<int64_t>(tiles, 1), shape.k / 4096) : 1);
}

constexpr GemmPlan plan_mma(const GemmShape& shape, const Device& device) {
  GemmPlan plan = {GemmKernel::kMma, 128, 128, 1, 0};
  if (plan.tiles(shape) < device.multiprocessors) plan.tile_m = plan.tile_n = 64;
  const int64_t tiles = std::max<int64_t>(plan.tiles(shape), 1);
  return with_parts(plan, shape.k, std::min(device.multiprocessors / tiles, shape.k / 1024));
}

constexpr int kWgmmaTileM = 128;
constexpr int kWgmmaCluster = 2;

constexpr bool wgmma_supports(const GemmShape& shape, const Device& device) {
  return device.capability == 90 && shape.k > 0 && shape.k <= kMaxPartOfK;
}

// The two tiles of a wgmma cluster lie along m and share the weight; with one tile along m, or an odd number
// along m and an even one along n, they lie along n and share q, which leaves fewer clusters half empty.
constexpr bool wgmma_pairs_along_m(const GemmPlan& plan, const GemmShape& shape) {
  const int64_t m = plan.tiles_m(shape), n = plan.tiles_n(shape);
  return m > 1 && (m % kWgmmaCluster == 0 || n % kWgmmaCluster != 0);
}

constexpr int64_t wgmma_pairs(const GemmPlan& plan, const GemmShape& shape) {
  const int64_t m = plan.tiles_m(shape), n = plan.tiles_n(shape);
  constexpr int64_t more = kWgmmaCluster - 1;
  return wgmma_pairs_along_m(plan, shape) ? (m + more) / kWgmmaCluster * n : m * ((n + more) / kWgmmaCluster);
}

// Estimated time of a product in units of 2.7 ns, fitted to whole forward passes at K = 4096 on an H200. A
// wave of wgmma tiles costs 37 columns plus its own; a wave of mma.sync tiles costs 245 columns.
constexpr int64_t cost(const GemmPlan& plan, const GemmShape& shape, const Device& device) {
  const int64_t steps = (plan.k_of_part + 127) / 128;
  if (plan.kernel == GemmKernel::kWgmma) {
    const int64_t clusters = std::max(device.multiprocessors / kWgmmaCluster, 1);
    return (wgmma_pairs(plan, shape) + clusters - 1) / clusters * (37 + plan.tile_n) * steps;
  }
  const int64_t waves =
      (plan.tiles(shape) * plan.parts + device.multiprocessors - 1) / device.multiprocessors;
  return waves * 245 * steps + (plan.parts > 1 ? 1500 : 0);
}

constexpr GemmPlan plan_wgmma(const GemmShape& shape, const Device& device) {
  GemmPlan best = {};
  for (int tile_n : {256, 128, 64, 32}) {
    const GemmPlan plan = with_parts({GemmKernel::kWgmma, kWgmmaTileM, tile_n, 1, 0}, shape.k, 1);
    if (best.tile_n == 0 || cost(plan, shape, device) < cost(best, shape, device)) best = plan;
  }
  return best;
}

constexpr GemmPlan plan_gemm(const GemmShape& shape, const Device& device) {
  const bool can = wgmma_supports(shape, device);
  if (shape.m <= 32) {
    // From 9 rows on, wgmma is faster if the blocks of the small kernel need a second wave.
    const GemmPlan small = plan_small(shape, device);
    if (shape.m <= 8 || !can || small.tiles(shape) <= 2 * device.multiprocessors) return small;
  }
  const GemmPlan mma = plan_mma(shape, device);
  if (!can) return mma;
  const GemmPlan wgmma = plan_wgmma(shape, device);
  return cost(wgmma, shape, device) <= cost(mma, shape, device) ? wgmma : mma;
}

// Counters (one per tile), then the parts' int32 sums [parts, m, n]; empty for a single part.
constexpr size_t counter_bytes(const GemmPlan& plan, const GemmShape& shape) {
  return plan.parts > 1 ? (plan.tiles(shape) * 4 + 15) / 16 * 16 : 0;
}

constexpr size_t workspace_bytes(const GemmPlan& plan, const GemmShape& shape) {
  return plan.parts > 1 ? counter_bytes(plan, shape) + plan.parts * shape.m * shape.n * 4 : 0;
}

struct TileIndex {
  uint32_t m;
  uint32_t n;
};

// Tiles in the order in which blocks process them: bands of `band` tiles along m, so that concurrent tiles
// share rows and columns in L2.
//
//        n ->
//   m  0 2 4 6      (band = 2)
//   |  1 3 5 7
//   v  8 ...
//
// 32 bits: each role of a block divides for every tile, and a 64-bit division takes some 70 instructions.
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr TileIndex
    tile_at(uint32_t index, uint32_t tiles_m, uint32_t tiles_n, uint32_t band) {
  const uint32_t tiles_of_band = band * tiles_n;
  const uint32_t first_m = index / tiles_of_band * band;
  const uint32_t in_band = index % tiles_of_band;
  const uint32_t height = tiles_m - first_m < band ? tiles_m - first_m : band;
  return {first_m + in_band % height, in_band / height};
}

}  // namespace dynquant::cuda
