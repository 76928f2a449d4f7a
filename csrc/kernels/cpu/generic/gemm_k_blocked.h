// The GEMM of few rows, by parts of K. A part of generic/kernels.h, over its V and Dot.
//
//   for a block of 64 channels
//     for a part of K                its weights stay in L1: narrow tiles pass over them several times
//       for a tile of rows
//         for a tile of channels     the accumulators wait in scratch for the next part

// Up to K = 1024 a block's weights come from L2 as fast.
constexpr bool takes_parts(int64_t m, int64_t k) {
  return Dot::kPartGroups > 0 && 1 < m && m <= 4 * Dot::kMaxRows && 1024 < k && k <= Dot::TakenOff::kMaxK;
}

// A panel of which a part of K is worked on, while the same lines of the next part come to L2.
template <int kVectors>
struct PanelPart : WidePanel<kVectors> {
  DYNQUANT_INLINE PanelPart(const Weight& w, int64_t channel, int64_t group)
      : WidePanel<kVectors>(w, channel) {
    this->b += group * this->group_stride;
    this->ahead = Dot::kPartGroups * this->group_stride;
  }

  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t* group) const {
    this->template fetch_lines<2>(group + this->ahead);
  }
};

template <typename Sink>
struct PartBody {
  const Sink& sink;
  int32_t* waiting;                // accumulators [rows][kBlock]
  int64_t first_row, block, end;   // end: of its channels
  int64_t group0, group1, groups;  // the part of K; of all K

  template <int kRows>
  void call(int64_t, int64_t m) const {
    add_tiles<kRows, Dot::kVectors<kRows>>(m, block);
  }

 private:
  template <int kRows, int kVectors>
  void add_tiles(int64_t m, int64_t c) const {
    const uint8_t* a = sink.a.data + m * sink.a.stride + group0 * Dot::kGroupBytes;
    for (; c + (kVectors - 1) * W < end; c += kVectors * W) {
      const PanelPart<kVectors> part(sink.w, c, group0);
      int32_t* stored = waiting + (m - first_row) * kBlock + c - block;
      Accumulators<kRows, kVectors> acc;
      if (group0 > 0) acc.load(stored, kBlock);
      acc.add(a, sink.a.stride, part, part.b, group1 - group0);
      group1 < groups ? acc.store(stored, kBlock) : sink.finish(m, c, acc, Dot::kOffset);
    }
    if constexpr (kVectors > 1) {
      if (c < end) add_tiles<kRows, kVectors / 2>(m, c);
    }
  }
};

template <typename Sink>
void gemm_parts(const Sink& sink, int8_t* scratch, RowTiles tiles, int64_t block) {
  const int64_t groups = (sink.w.k + 3) / 4;
  PartBody<Sink> body{sink,
                      reinterpret_cast<int32_t*>(scratch),
                      TileRows(tiles).first(tiles.begin),
                      block,
                      least(block + kBlock, sink.w.n),
                      0,
                      0,
                      groups};
  for (; body.group0 < groups; body.group0 = body.group1) {
    body.group1 = least(groups, body.group0 + Dot::kPartGroups);
    for_row_tiles(tiles, body);
  }
}
