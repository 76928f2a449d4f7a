// The GEMM over the packed weight as it lies: tiles of rows, and of channels. A part of generic/kernels.h, over its V and Dot.

// What a plan's steps fetch meanwhile: here nothing, over gathered weights FetchEvenly.
struct FetchNothing {
  DYNQUANT_INLINE void over(int64_t) {}
  DYNQUANT_INLINE void step() {}
};

// A panel that several row tiles pass over while the next one comes to L2, a share with each: the first tile would have
// to wait for L3, and the others leave it idle. Each share in two streams: the hardware then runs ahead in both.
template <int kVectors>
struct SweptPanel : WidePanel<kVectors> {
  const int8_t* next;
  int64_t half, step;

  DYNQUANT_INLINE SweptPanel(const Weight& w, int64_t channel, RowTiles tiles, int64_t t)
      : WidePanel<kVectors>(w, channel) {
    const int64_t bytes = this->groups * this->group_stride, count = tiles.end - tiles.begin;
    next = this->b + bytes + bytes / count * (t - tiles.begin);  // the next panel follows
    half = bytes / count / 2;
    step = this->group_stride / count / 2;
  }

  // A smaller weight stays in L2 between calls, and one tile alone is followed by the hardware.
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

template <int kRows, int kVectors, typename Tile, typename Sink, typename D = Dot>
DYNQUANT_INLINE void gemm_tile(const Sink& sink, const Tile& weight, int64_t t, int64_t m, int64_t channel) {
  const uint8_t* a = sink.a.data + m * sink.a.stride;
  sink.template fetch<kRows, kVectors>(m, channel);
  if constexpr (D::kPlans) {
    if (sink.a.plan_stride > 0) {
      const typename D::Plan& plan = plan_of<D>(sink.a, t);
      Accumulators<kRows, kVectors> acc(plan.start);
      Tile part = weight;
      for (int64_t g = 0; g < weight.groups; g += plan.groups_of_part) {
        D::add(plan, g, acc, a + g * D::kGroupBytes, sink.a.stride, part, FetchNothing());
        part.b += plan.groups_of_part * part.group_stride;
      }
      return sink.finish(m, channel, acc, plan.offset);
    }
  }
  Accumulators<kRows, kVectors> acc;
  acc.add(a, sink.a.stride, weight, weight.b, weight.groups);
  sink.finish(m, channel, acc, Dot::kOffset);
}

// Rows [m, m + kRows) of row tile t of `tiles` and channels [c0, c1), in tiles of kVectors vectors and, where fewer are
// left, of half as many.
template <int kRows, int kVectors, typename Sink>
void gemm_tiles(const Sink& sink, RowTiles tiles, int64_t t, int64_t m, int64_t c0, int64_t c1) {
  constexpr bool kInPanel = kVectors * W <= kBlock;
  constexpr bool kSweeps = kRows > 2 && kVectors * W == kBlock && Dot::kPartGroups == 0;
  int64_t c = c0;
  for (; c + (kVectors - 1) * W < c1; c += kVectors * W) {
    if (sink.w.k > Dot::TakenOff::kMaxK) {
      sink.template deep<kRows, kVectors>(m, c, NarrowPanels<kVectors>(sink.w, c));
    } else if (kSweeps && SweptPanel<kVectors>::pays(sink.w, tiles)) {
      if constexpr (kSweeps) {
        gemm_tile<kRows, kVectors>(sink, SweptPanel<kVectors>(sink.w, c, tiles, t), t, m, c);
      }
    } else if (kInPanel && sink.w.panel >= kVectors * W) {
      if constexpr (kInPanel) gemm_tile<kRows, kVectors>(sink, WidePanel<kVectors>(sink.w, c), t, m, c);
    } else {
      gemm_tile<kRows, kVectors>(sink, NarrowPanels<kVectors>(sink.w, c), t, m, c);
    }
  }
  if constexpr (kVectors > 1) {
    if (c < c1) gemm_tiles<kRows, kVectors / 2>(sink, tiles, t, m, c, c1);
  }
}

// Calls body.template call<rows of the tile>(t, first row) for each row tile.
template <int kRows, typename Body>
void call_with_rows(const Body& body, int64_t t, int64_t m, int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return call_with_rows<kRows - 1>(body, t, m, rows);
  }
  body.template call<kRows>(t, m);
}

template <typename Body>
void for_row_tiles(RowTiles tiles, const Body& body) {
  const TileRows cut(tiles);
  for (int64_t t = tiles.begin, m = cut.first(t); t < tiles.end; ++t) {
    const int64_t next = cut.first(t + 1);
    call_with_rows<Dot::kMaxRows>(body, t, m, next - m);
    m = next;
  }
}

template <typename Sink>
struct PackedBody {
  const Sink& sink;
  RowTiles tiles;
  int64_t c0, c1;

  template <int kRows>
  void call(int64_t t, int64_t m) const {
    gemm_tiles<kRows, Dot::kVectors<kRows>>(sink, tiles, t, m, c0, c1);
  }
};

constexpr int kWideVectors = Dot::kVectors<Dot::kMaxRows>;
constexpr int64_t kWidth = kWideVectors * W;  // channels of a tile of many rows
