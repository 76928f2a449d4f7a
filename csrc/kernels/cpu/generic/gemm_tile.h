// A tile of the GEMM: the source of its weights, and its accumulators. Included by generic/kernels.h.
//
// A tile is kRows rows of x times kVectors vectors of W output channels, its int32 accumulators all in
// registers:
//
//                       packed weight, one group of 4 along K
//                     +--------+--------+--------+--------+
//                     |  b[0]  |  b[1]  |  b[2]  |  b[3]  |   a vector: W channels x 4 int8
//                     +--------+--------+--------+--------+
//   a[0] broadcast    |acc[0,0]|acc[0,1]|acc[0,2]|acc[0,3]|   W x int32 each
//   a[1] broadcast    |acc[1,0]|acc[1,1]|acc[1,2]|acc[1,3]|
//     ...             |   ...  |   ...  |   ...  |   ...  |
//   a[5] broadcast    |acc[5,0]|acc[5,1]|acc[5,2]|acc[5,3]|
//                     +--------+--------+--------+--------+
//
//   zmm         6 x 4 = 24 accumulators + 4 b + 1 a of 32 registers
//   ymm, VNNI   6 x 2 = 12 accumulators + 2 b + 1 a of 16
//   ymm, AVX2   2 x 4 = 8 accumulators; see dot/avx2_pairs.h
//
// With 1 and 2 rows, reading the weight is the limit: tiles are as wide as the registers allow, so that a
// panel takes few passes and there are enough chains of additions to hide their latency (Dot::kVectors).

// The weight vectors of a tile, adjacent in a panel at least as wide as the tile ...
template <int kVectors>
struct WidePanel {
  static constexpr bool kBiased = false;

  const int8_t* b;  // vector 0, group 0
  int64_t group_stride, groups, ahead;

  // Beyond the reach of the hardware prefetcher: from L3, or from memory.
  DYNQUANT_INLINE WidePanel(const Weight& w, int64_t channel)
      : group_stride(w.panel * 4), groups((w.k + 3) / 4), ahead(w.n * w.k > (8 << 20) ? 16384 : 4096) {
    const int64_t in_panel = channel & (w.panel - 1);  // a panel's width is a power of two
    b = w.packed + (channel - in_panel) * groups * 4 + in_panel * 4;
  }

  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group) + j * W);
  }

  // Only for one row, which reads a weight once, and narrow tiles, which read a part of each panel line.
  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t* group) const {
    if constexpr (kRows == 1 || Dot::kGroupsOfKBlock > 0) fetch_lines<3>(group + ahead);
  }

 protected:
  template <int kLocality>
  DYNQUANT_INLINE static void fetch_lines(const int8_t* at) {
    for (int64_t line = 0; line < kVectors * W * 4; line += 64) __builtin_prefetch(at + line, 0, kLocality);
  }
};

// ... or spread over several narrower panels.
template <int kVectors>
struct NarrowPanels {
  static constexpr bool kBiased = false;

  const int8_t* b;
  int64_t group_stride, groups;
  int64_t offset[kVectors];  // of vector j from vector 0

  DYNQUANT_INLINE NarrowPanels(const Weight& w, int64_t channel)
      : group_stride(w.panel * 4), groups((w.k + 3) / 4) {
    const auto at = [&](int64_t c) {
      const int64_t in_panel = c & (w.panel - 1);
      return (c - in_panel) * groups * 4 + in_panel * 4;
    };
    b = w.packed + at(channel);
    for (int j = 0; j < kVectors; ++j) offset[j] = at(channel + j * W) - at(channel);
  }

  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group + offset[j]));
  }

  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t*) const {}
};

template <int kRows, int kVectors>
struct Accumulators {
  I acc[kRows][kVectors];

  // All channels of row i start from start[i].
  DYNQUANT_INLINE explicit Accumulators(const int32_t* start) {
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = V::broadcast(start[i]);
    }
  }

  DYNQUANT_INLINE Accumulators() {
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = V::broadcast(0);
    }
  }

  DYNQUANT_INLINE void load(const int32_t* sums, int64_t stride) {
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = V::load(sums + i * stride + j * W);
    }
  }

  DYNQUANT_INLINE void store(int32_t* sums, int64_t stride) const {
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) V::store(sums + i * stride + j * W, acc[i][j]);
    }
  }

  // Adds the products of one group: activations at a, weights at b.
  template <typename... Steps, typename Tile>
  DYNQUANT_INLINE void add_group(Products<Steps...>, const uint8_t* a, int64_t a_stride, const Tile& w,
                                 const int8_t* b) {
    (add_step<Steps>(a, a_stride, w, b), ...);
  }

  // Adds the products of two adjacent groups, by a step that takes both.
  template <typename Step, typename Tile>
  DYNQUANT_INLINE void add_two_groups(const uint8_t* a, int64_t a_stride, const Tile& w, const int8_t* b) {
    I activations[kRows][2];
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      activations[i][0] = broadcast_activations(a + i * a_stride);
      activations[i][1] = broadcast_activations(a + i * a_stride + Dot::kGroupBytes);
    }
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const I w0 = weight<Step>(w, b, j), w1 = weight<Step>(w, b + w.group_stride, j);
      if constexpr (kRows == 1) {
        Step::multiply_add_two(acc[0][j], activations[0], w0, w1);
      } else {
        static_assert(kRows == 2);
        Step::multiply_add_two(acc[0][j], acc[1][j], activations[0], activations[1], w0, w1);
      }
    }
  }

  // Adds `groups` groups from a and b on, for any values.
  template <typename Tile>
  DYNQUANT_INLINE void add(const uint8_t* a, int64_t a_stride, Tile w, const int8_t* b, int64_t groups) {
    for (int64_t g = 0; g < groups; ++g) {
      w.template fetch_ahead<kRows>(b);
      add_group(typename Dot::Exact(), a, a_stride, w, b);
      a += Dot::kGroupBytes;
      b += w.group_stride;
    }
  }

 private:
  template <typename Step, typename Tile>
  DYNQUANT_INLINE static I weight(const Tile& w, const int8_t* b, int j) {
    if constexpr (Tile::kBiased) {
      return Step::weight_of_biased(w.load(b, j));
    } else {
      return Step::weight(w.load(b, j));
    }
  }

  DYNQUANT_INLINE static I broadcast_activations(const uint8_t* a) {
    int32_t bytes;
    __builtin_memcpy(&bytes, a, sizeof(bytes));
    return V::broadcast(bytes);
  }

  template <typename Step, typename Tile>
  DYNQUANT_INLINE void add_step(const uint8_t* a, int64_t a_stride, const Tile& w, const int8_t* b) {
    I bv[kVectors];
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) bv[j] = weight<Step>(w, b, j);
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const I av = broadcast_activations(a + i * a_stride + Step::kActivationsAt);
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Step::multiply_add(acc[i][j], av, bv[j]);
    }
  }
};
