// The GEMM by plans, over gathered weights. A part of generic/kernels.h, over its V and Dot.
//
//   for a block of 64 channels
//     for a part of K                its weights are gathered once, a tile's side by side
//       for a tile of channels       its weights stay in L1 while all rows go by
//         for a tile of rows         as planned; the accumulators wait in scratch for the next part

// A copy in which a tile has its cache lines side by side: those of a wider panel would share L1's sets.
// Flipped: of w + 128 as unsigned bytes.
template <int kVectors, bool kFlip>
struct GatheredTile {
  static constexpr bool kFlipped = kFlip;
  static constexpr int64_t group_stride = kVectors * W * 4;

  const int8_t* b;
  int64_t groups;

  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group) + j * W);
  }

  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t*) const {}
};

// Brings `bytes` from `at` on to L2, evenly over a tile's steps: a burst would have to wait for the memory.
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

template <typename Sink, typename D, bool kFlip>
struct GatheredBody {
  using Gathered = GatheredTile<kWideVectors, kFlip>;
  static constexpr int64_t kTiles = kBlock / kWidth;

  const Sink& sink;
  int8_t* scratch;  // gathered weights [kTiles][kPartGroups], then accumulators [kTiles][rows][kWidth]
  RowTiles tiles;
  int64_t block, groups;         // the first of its channels; of all K
  int64_t first_row, rows;       // of `tiles`
  int64_t group0, group1, tile;  // the part of K, the tile of channels

  static int64_t scratch_bytes(int64_t rows) {
    return kTiles * (D::kPartGroups + rows) * Gathered::group_stride;
  }

  void gather() const {
    const WidePanel<kTiles * kWideVectors> from(sink.w, block);
    const int8_t* b = from.b + group0 * from.group_stride;
    for (int64_t g = 0; g < group1 - group0; ++g) {
      DYNQUANT_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        int32_t* to = reinterpret_cast<int32_t*>(gathered(i) + g * Gathered::group_stride);
        DYNQUANT_UNROLL
        for (int j = 0; j < kWideVectors; ++j) {
          const I w = from.load(b, i * kWideVectors + j);
          V::store(to + j * W, kFlip ? D::flip(w) : w);
        }
      }
      b += from.group_stride;
    }
  }

  template <int kRows>
  void call(int64_t t, int64_t m) const {
    const typename D::Plan& plan = plan_of<D>(sink.a, t);
    const uint8_t* a = sink.a.data + m * sink.a.stride + group0 * D::kGroupBytes;
    const int64_t channel = block + tile * kWidth;
    int32_t* stored = accumulators() + (m - first_row) * kWidth;
    Accumulators<kRows, kWideVectors> acc(plan.start);
    if (group0 > 0) acc.load(stored, kWidth);
    if (group1 == groups) sink.template fetch<kRows, kWideVectors>(m, channel);
    D::add(plan, group0, acc, a, sink.a.stride, Gathered{gathered(tile), group1 - group0}, what_is_next(t));
    group1 < groups ? acc.store(stored, kWidth) : sink.finish(m, channel, acc, plan.offset);
  }

 private:
  int8_t* gathered(int64_t i) const { return scratch + i * D::kPartGroups * Gathered::group_stride; }

  int32_t* accumulators() const {
    return reinterpret_cast<int32_t*>(gathered(kTiles)) + tile * rows * kWidth;
  }

  // What is gathered next comes from memory meanwhile, a share with each tile.
  FetchEvenly what_is_next(int64_t t) const {
    const int64_t bytes = (group1 - group0) * kBlock * 4, row_tiles = tiles.end - tiles.begin;
    const int64_t share = bytes / (kTiles * row_tiles) + 1;
    const int8_t* next = sink.w.packed + block * groups * 4 + group1 * kBlock * 4;  // the next block follows
    return FetchEvenly{next + (tile * row_tiles + t - tiles.begin) * share, share, 0};
  }
};

template <bool kFlip, typename Sink, typename D = Dot>
void gemm_gathered(const Sink& sink, int8_t* scratch, RowTiles tiles, int64_t block) {
  if constexpr (D::kPlans) {
    using Body = GatheredBody<Sink, D, kFlip>;
    const TileRows cut(tiles);
    const int64_t groups = (sink.w.k + 3) / 4, part = D::groups_of_part(groups);
    const int64_t first_row = cut.first(tiles.begin), rows = cut.first(tiles.end) - first_row;
    for (int64_t g = 0; g < groups; g += part) {
      Body body{sink, scratch, tiles, block, groups, first_row, rows, g, least(groups, g + part), 0};
      body.gather();
      for (; body.tile < Body::kTiles; ++body.tile) for_row_tiles(tiles, body);
    }
  }
}
