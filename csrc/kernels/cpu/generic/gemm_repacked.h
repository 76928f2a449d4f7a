// The GEMM by plans, over repacked weights. Included by generic/kernels.h.
//
//   for a block of 64 channels
//     for a block of K               its weights are repacked once, the lines of a tile side by side
//       for a tile of channels       its weights stay in L1 for all row tiles
//         for a tile of rows         as planned; accumulators wait in scratch for the next block of K

// A tile of the repacked copy, whose cache lines are adjacent: the lines of a wider panel would share L1
// sets. kBias: holds w + 128 as unsigned bytes.
template <int kVectors, bool kBias>
struct RepackedTile {
  static constexpr bool kBiased = kBias;
  static constexpr int64_t group_stride = kVectors * W * 4;

  const int8_t* b;
  int64_t groups;

  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group) + j * W);
  }

  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t*) const {}
};

// Prefetches `bytes` bytes from `at` on to L2, evenly over the steps of a tile: a burst would stall on
// memory.
struct FetchEvenly {
  const int8_t* at;
  int64_t bytes, stride;

  DYNQUANT_INLINE void over(int64_t steps) {
    stride = static_cast<uint32_t>(bytes) / static_cast<uint32_t>(steps + 1) + 1;
  }

  DYNQUANT_INLINE void step() {
    __builtin_prefetch(at, 0, 2);
    at += stride;
  }
};

template <typename Output, typename D, bool kBias>
struct RepackedBody {
  using Repacked = RepackedTile<kWideVectors, kBias>;
  static constexpr int64_t kTiles = kBlock / kWidth;

  const Output& output;
  int8_t* scratch;  // repacked weights [kTiles][kGroupsOfKBlock], then accumulators [kTiles][rows][kWidth]
  RowTiles tiles;
  int64_t block, groups;         // the first channel; the groups of all K
  int64_t first_row, rows;       // of `tiles`
  int64_t group0, group1, tile;  // the block of K, the tile of channels

  static int64_t scratch_bytes(int64_t rows) {
    return kTiles * (D::kGroupsOfKBlock + rows) * Repacked::group_stride;
  }

  void repack() const {
    const WidePanel<kTiles * kWideVectors> from(output.w, block);
    const int8_t* b = from.b + group0 * from.group_stride;
    for (int64_t g = 0; g < group1 - group0; ++g) {
      DYNQUANT_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        int32_t* to = reinterpret_cast<int32_t*>(repacked(i) + g * Repacked::group_stride);
        DYNQUANT_UNROLL
        for (int j = 0; j < kWideVectors; ++j) {
          const I w = from.load(b, i * kWideVectors + j);
          V::store(to + j * W, kBias ? D::toggle_bias(w) : w);
        }
      }
      b += from.group_stride;
    }
  }

  template <int kRows>
  void call(int64_t t, int64_t m) const {
    const typename D::Plan& plan = plan_of<D>(output.a, t);
    const uint8_t* a = output.a.data + m * output.a.stride + group0 * D::kGroupBytes;
    const int64_t channel = block + tile * kWidth;
    int32_t* stored = accumulators() + (m - first_row) * kWidth;
    Accumulators<kRows, kWideVectors> acc(plan.start);
    if (group0 > 0) acc.load(stored, kWidth);
    if (group1 == groups) output.template fetch<kRows, kWideVectors>(m, channel);
    D::add(plan, group0, acc, a, output.a.stride, Repacked{repacked(tile), group1 - group0}, next_weights(t));
    group1 < groups ? acc.store(stored, kWidth) : output.finish(m, channel, acc, plan.offset);
  }

 private:
  int8_t* repacked(int64_t i) const { return scratch + i * D::kGroupsOfKBlock * Repacked::group_stride; }

  int32_t* accumulators() const {
    return reinterpret_cast<int32_t*>(repacked(kTiles)) + tile * rows * kWidth;
  }

  // Each tile prefetches its share of the next weights to repack.
  FetchEvenly next_weights(int64_t t) const {
    const int64_t bytes = (group1 - group0) * kBlock * 4, row_tiles = tiles.end - tiles.begin;
    const int64_t share = bytes / (kTiles * row_tiles) + 1;
    const int8_t* next =
        output.w.packed + block * groups * 4 + group1 * kBlock * 4;  // the next block is adjacent
    return FetchEvenly{next + (tile * row_tiles + t - tiles.begin) * share, share, 0};
  }
};

template <bool kBias, typename Output, typename D = Dot>
void gemm_repacked(const Output& output, int8_t* scratch, RowTiles tiles, int64_t block) {
  if constexpr (D::kPlans) {
    using Body = RepackedBody<Output, D, kBias>;
    const TileRows tile_rows(tiles);
    const int64_t groups = (output.w.k + 3) / 4, k_block = D::groups_of_k_block(groups);
    const int64_t first_row = tile_rows.first(tiles.begin), rows = tile_rows.first(tiles.end) - first_row;
    for (int64_t g = 0; g < groups; g += k_block) {
      Body body{output, scratch, tiles, block, groups, first_row, rows, g, least(groups, g + k_block), 0};
      body.repack();
      for (; body.tile < Body::kTiles; ++body.tile) for_row_tiles(tiles, body);
    }
  }
}
