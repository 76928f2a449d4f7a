// The GEMM of few rows, blocked along K. Included by generic/kernels.h.
//
//   for a block of 64 channels
//     for a block of K               its weights stay in L1: narrow tiles pass over them several times
//       for a tile of rows
//         for a tile of channels     accumulators wait in scratch for the next block of K

// Up to K = 1024 reading a block's weights from L2 is as fast.
constexpr bool is_k_blocked(int64_t m, int64_t k) {
  return Dot::kGroupsOfKBlock > 0 && 1 < m && m <= 4 * Dot::kMaxRows && 1024 < k &&
         k <= Dot::ZeroPointCompensation::kMaxK;
}

// A block of K of a panel; meanwhile the same lines of the next block are prefetched to L2.
template <int kVectors>
struct PanelKBlock : WidePanel<kVectors> {
  DYNQUANT_INLINE PanelKBlock(const Weight& w, int64_t channel, int64_t group)
      : WidePanel<kVectors>(w, channel) {
    this->b += group * this->group_stride;
    this->ahead = Dot::kGroupsOfKBlock * this->group_stride;
  }

  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t* group) const {
    this->template fetch_lines<2>(group + this->ahead);
  }
};

template <typename Output>
struct KBlockedBody {
  const Output& output;
  int32_t* waiting;                // accumulators [rows][kBlock]
  int64_t first_row, block, end;   // end: behind its last channel
  int64_t group0, group1, groups;  // the block of K; of all K

  template <int kRows>
  void call(int64_t, int64_t m) const {
    add_tiles<kRows, Dot::kVectors<kRows>>(m, block);
  }

 private:
  template <int kRows, int kVectors>
  void add_tiles(int64_t m, int64_t c) const {
    const uint8_t* a = output.a.data + m * output.a.stride + group0 * Dot::kGroupBytes;
    for (; c + (kVectors - 1) * W < end; c += kVectors * W) {
      const PanelKBlock<kVectors> k_block(output.w, c, group0);
      int32_t* stored = waiting + (m - first_row) * kBlock + c - block;
      Accumulators<kRows, kVectors> acc;
      if (group0 > 0) acc.load(stored, kBlock);
      acc.add(a, output.a.stride, k_block, k_block.b, group1 - group0);
      group1 < groups ? acc.store(stored, kBlock) : output.finish(m, c, acc, Dot::kOffset);
    }
    if constexpr (kVectors > 1) {
      if (c < end) add_tiles<kRows, kVectors / 2>(m, c);
    }
  }
};

template <typename Output>
void gemm_k_blocked(const Output& output, int8_t* scratch, RowTiles tiles, int64_t block) {
  const int64_t groups = (output.w.k + 3) / 4;
  KBlockedBody<Output> body{output,
                            reinterpret_cast<int32_t*>(scratch),
                            TileRows(tiles).first(tiles.begin),
                            block,
                            least(block + kBlock, output.w.n),
                            0,
                            0,
                            groups};
  for (; body.group0 < groups; body.group0 = body.group1) {
    body.group1 = least(groups, body.group0 + Dot::kGroupsOfKBlock);
    for_row_tiles(tiles, body);
  }
}
