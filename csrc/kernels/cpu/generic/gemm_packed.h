// The GEMM that reads the packed weight in place. Included by generic/kernels.h.

// Prefetching during the steps of a plan: none here; FetchEvenly with repacked weights.
struct FetchNothing {
  DYNQUANT_INLINE void over(int64_t) {}
  DYNQUANT_INLINE void step() {}
};

// A panel that several row tiles share. Each tile prefetches its share of the next panel to L2: otherwise the
// first tile waits for L3 and later tiles leave its bandwidth unused. Two streams let the hardware prefetcher
// follow both.
template <int kVectors>
struct SweptPanel : WidePanel<kVectors> {
  const int8_t* next;
  int64_t half, step;

  DYNQUANT_INLINE SweptPanel(const Weight& w, int64_t channel, RowTiles tiles, int64_t t)
      : WidePanel<kVectors>(w, channel) {
    const int64_t bytes = this->groups * this->group_stride, count = tiles.end - tiles.begin;
    next = this->b + bytes + bytes / count * (t - tiles.begin);  // the next panel is adjacent
    half = bytes / count / 2;
    step = this->group_stride / count / 2;
  }

  // A smaller weight stays in L2 between calls, and the hardware prefetcher keeps up with a single tile.
  static bool pays(const Weight& w, RowTiles tiles) {
    return w.panel == kVectors * W && w.n * w.k > (1 << 20) && tiles.end - tiles.begin > 1;
  }

  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t*) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + half, 0, 2);
    next += step;
  }
};

template <int kRows, int kVectors, typename Tile, typename Output, typename D = Dot>
DYNQUANT_INLINE void gemm_tile(const Output& output, const Tile& weight, int64_t t, int64_t m,
                               int64_t channel) {
  const uint8_t* a = output.a.data + m * output.a.stride;
  output.template fetch<kRows, kVectors>(m, channel);
  if constexpr (D::kPlans) {
    if (output.a.plan_stride > 0) {
      const typename D::Plan& plan = plan_of<D>(output.a, t);
      Accumulators<kRows, kVectors> acc(plan.start);
      Tile k_block = weight;
      for (int64_t g = 0; g < weight.groups; g += plan.groups_of_k_block) {
        D::add(plan, g, acc, a + g * D::kGroupBytes, output.a.stride, k_block, FetchNothing());
        k_block.b += plan.groups_of_k_block * k_block.group_stride;
      }
      return output.finish(m, channel, acc, plan.offset);
    }
  }
  Accumulators<kRows, kVectors> acc;
  acc.add(a, output.a.stride, weight, weight.b, weight.groups);
  output.finish(m, channel, acc, Dot::kOffset);
}

// Rows [m, m + kRows) of row tile t of `tiles` and channels [c0, c1), in tiles of kVectors vectors, the rest
// in tiles of half as many.
template <int kRows, int kVectors, typename Output>
void gemm_tiles(const Output& output, RowTiles tiles, int64_t t, int64_t m, int64_t c0, int64_t c1) {
  constexpr bool kInPanel = kVectors * W <= kBlock;
  constexpr bool kSweeps = kRows > 2 && kVectors * W == kBlock && Dot::kGroupsOfKBlock == 0;
  int64_t c = c0;
  for (; c + (kVectors - 1) * W < c1; c += kVectors * W) {
    if (output.w.k > Dot::ZeroPointCompensation::kMaxK) {
      output.template wide_accumulate<kRows, kVectors>(m, c, NarrowPanels<kVectors>(output.w, c));
    } else if (kSweeps && SweptPanel<kVectors>::pays(output.w, tiles)) {
      if constexpr (kSweeps) {
        gemm_tile<kRows, kVectors>(output, SweptPanel<kVectors>(output.w, c, tiles, t), t, m, c);
      }
    } else if (kInPanel && output.w.panel >= kVectors * W) {
      if constexpr (kInPanel) gemm_tile<kRows, kVectors>(output, WidePanel<kVectors>(output.w, c), t, m, c);
    } else {
      gemm_tile<kRows, kVectors>(output, NarrowPanels<kVectors>(output.w, c), t, m, c);
    }
  }
  if constexpr (kVectors > 1) {
    if (c < c1) gemm_tiles<kRows, kVectors / 2>(output, tiles, t, m, c, c1);
  }
}

// Calls body.template call<number of rows>(t, first row) for each row tile.
template <int kRows, typename Body>
void call_with_rows(const Body& body, int64_t t, int64_t m, int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return call_with_rows<kRows - 1>(body, t, m, rows);
  }
  body.template call<kRows>(t, m);
}

template <typename Body>
void for_row_tiles(RowTiles tiles, const Body& body) {
  const TileRows tile_rows(tiles);
  for (int64_t t = tiles.begin, m = tile_rows.first(t); t < tiles.end; ++t) {
    const int64_t next = tile_rows.first(t + 1);
    call_with_rows<Dot::kMaxRows>(body, t, m, next - m);
    m = next;
  }
}

template <typename Output>
struct PackedBody {
  const Output& output;
  RowTiles tiles;
  int64_t c0, c1;

  template <int kRows>
  void call(int64_t t, int64_t m) const {
    gemm_tiles<kRows, Dot::kVectors<kRows>>(output, tiles, t, m, c0, c1);
  }
};

constexpr int kWideVectors = Dot::kVectors<Dot::kMaxRows>;
constexpr int64_t kWidth = kWideVectors * W;  // channels of a tile of many rows
