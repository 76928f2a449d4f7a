// The GEMM: tiles, dequantization and epilogue, and the order in which they go over a matrix. A part of
// kernel_body.h, over its V and Dot.

// ---- GEMM ----------------------------------------------------------------------------------------------------------
//
// A tile is kRows rows of x times kVectors vectors of W output channels, its int32 accumulators all in registers:
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
//   zmm: 6 x 4 = 24 accumulators + 4 b + 1 a of 32 registers; ymm: 6 x 2 = 12 + 2 b + 1 a of 16 (V::kVectorsOf...).
//   1 and 2 rows are bound by the reading of the weight: tiles as wide as the registers allow, so that each panel
//   is read in few passes and the chains of additions are enough to hide their latency.
//
// Dot::kSteps is in how many steps a group of 4 is multiplied: 1 with VNNI, 2 where bytes are first widened to 16 bits.

template <int kRows>
constexpr int tile_vectors() {
  return kRows == 1 ? V::kVectorsOfOneRow : kRows == 2 ? V::kVectorsOfTwoRows : V::kVectorsOfManyRows;
}

constexpr int kMaxRows = 6;

// Where a tile's weight vectors come from: the packed weight ...
template <int kVectors>
struct PackedTile {
  const int8_t* b;           // vector 0, group 0
  int64_t offset[kVectors];  // of vector j from vector 0: panels narrower than a tile lie apart
  int64_t group_stride;

  DYNQUANT_INLINE PackedTile(const Weight& w, int64_t channel) {
    const int64_t groups = (w.k + 3) / 4;
    group_stride = w.panel * 4;
    const auto at = [&](int64_t c) { return c / w.panel * groups * group_stride + c % w.panel * 4; };
    b = w.packed + at(channel);
    for (int j = 0; j < kVectors; ++j) offset[j] = at(channel + j * W) - at(channel);
  }

  template <int kStep>
  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return Dot::template load_weight<kStep>(group + offset[j]);
  }
};

// ... or, where a weight takes more than a load, a copy that is ready to multiply: worth it for many rows.
// [groups][kSteps][kVectors][W] int32.
template <int kVectors>
struct WidenedTile {
  static constexpr int64_t kVectorBytes = W * sizeof(int32_t);
  static constexpr int64_t group_stride = Dot::kSteps * kVectors * kVectorBytes;

  template <int kStep>
  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group + (kStep * kVectors + j) * kVectorBytes));
  }
};

template <int kRows, int kVectors>
struct Accumulators {
  I acc[kRows][kVectors];

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

  // Adds `groups` groups: the operand's from a on, the weight's from b on. Where the next part of the weight is named,
  // a line of it is fetched to L2 with each group.
  template <bool kFetchNext = false, typename Tile>
  DYNQUANT_INLINE void add(const uint8_t* a, int64_t a_stride, const Tile& w, const int8_t* b, int64_t groups,
                           const int8_t* next = nullptr, int64_t next_stride = 0) {
    for (int64_t g = 0; g < groups; ++g) {
      steps<0>(a, a_stride, w, b);
      a += Dot::kGroupBytes;
      b += w.group_stride;
      if constexpr (kFetchNext) {
        __builtin_prefetch(next, 0, 2);
        next += next_stride;
      }
    }
  }

 private:
  template <int kStep, typename Tile>
  DYNQUANT_INLINE void steps(const uint8_t* a, int64_t a_stride, const Tile& w, const int8_t* b) {
    if constexpr (kStep < Dot::kSteps) {
      I bv[kVectors];
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) bv[j] = w.template load<kStep>(b, j);
      DYNQUANT_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const I av = Dot::template broadcast_operand<kStep>(a + i * a_stride);
        DYNQUANT_UNROLL
        for (int j = 0; j < kVectors; ++j) acc[i][j] = Dot::multiply_add(acc[i][j], av, bv[j]);
      }
      steps<kStep + 1>(a, a_stride, w, b);
    }
  }
};

// The one dequantization formula. Vectors: constants of W channels that may be read whole.
template <int kRows, int kVectors>
DYNQUANT_INLINE void dequantize(const Accumulators<kRows, kVectors>& tile, const QParams* qparams,
                                const int32_t* sum, const float* scale, const float* bias, float* out,
                                int64_t stride) {
  DYNQUANT_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    const I sums = V::load(sum + j * W);
    const F scales = V::load(scale + j * W);
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const I offset = V::broadcast(qparams[i].zero_point + Dot::kOffset);
      const F acc = V::convert(V::sub(tile.acc[i][j], V::mul(offset, sums)));
      F y = V::mul(V::mul(acc, V::broadcast(qparams[i].scale)), scales);
      if (bias != nullptr) y = V::add(y, V::load(bias + j * W));
      V::store(out + i * stride + j * W, y);
    }
  }
}

#include "../epilogue_math.h"

template <Epilogue kEpilogue, typename Vectors>
DYNQUANT_INLINE typename Vectors::F epilogue_of(typename Vectors::F x) {
  using Math = EpilogueMath<Vectors>;
  if constexpr (kEpilogue == Epilogue::kRelu) return Math::relu(x);
  if constexpr (kEpilogue == Epilogue::kGelu) return Math::gelu(x);
  if constexpr (kEpilogue == Epilogue::kGeluTanh) return Math::gelu_tanh(x);
  if constexpr (kEpilogue == Epilogue::kSilu) return Math::silu(x);
}

template <Epilogue kEpilogue>
void apply_epilogue_to(float* y, int64_t stride, int rows, int64_t width) {
  using Pair = Several<V, 2>;
  for (int i = 0; i < rows; ++i) {
    float* row = y + i * stride;
    int64_t j = 0;
    for (; j + 2 * W <= width; j += 2 * W) {
      const Pair::F done = epilogue_of<kEpilogue, Pair>(Pair::F{{V::load(row + j), V::load(row + j + W)}});
      V::store(row + j, done.v[0]);
      V::store(row + j + W, done.v[1]);
    }
    if (j < width) V::store(row + j, epilogue_of<kEpilogue, V>(V::load(row + j)));
  }
}

// In place, on whole vectors: width is a multiple of W.
void apply_epilogue(Epilogue epilogue, float* y, int64_t stride, int rows, int64_t width) {
  switch (epilogue) {
    case Epilogue::kNone: return;
    case Epilogue::kRelu: return apply_epilogue_to<Epilogue::kRelu>(y, stride, rows, width);
    case Epilogue::kGelu: return apply_epilogue_to<Epilogue::kGelu>(y, stride, rows, width);
    case Epilogue::kGeluTanh: return apply_epilogue_to<Epilogue::kGeluTanh>(y, stride, rows, width);
    case Epilogue::kSilu: return apply_epilogue_to<Epilogue::kSilu>(y, stride, rows, width);
  }
}

// What is done with the accumulators of a tile: dequantized to the output, or kept as they are.
struct LinearSink {
  Operand a;
  const QParams* qparams;
  const Weight& w;
  const Output& out;

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void finish(int64_t m, int64_t channel, const Accumulators<kRows, kVectors>& acc) const {
    deliver<kRows, kVectors>(m, channel, [&](const Channels& c, float* to, int64_t stride) {
      dequantize(acc, qparams + m, c.sum, c.scale, c.bias, to, stride);
    });
  }

  // K so deep that an int32 could wrap: parts of K in int32, added in int64.
  template <int kRows, int kVectors, typename Tile>
  void deep(int64_t m, int64_t channel, const Tile& weight) const {
    constexpr int64_t kPart = kMaxInt32K / 4;
    const int64_t groups = (w.k + 3) / 4;
    int64_t total[kRows][kVectors * W] = {};
    for (int64_t g = 0; g < groups; g += kPart) {
      Accumulators<kRows, kVectors> acc;
      acc.add(a.data + m * a.stride + g * Dot::kGroupBytes, a.stride, weight,
              weight.b + g * weight.group_stride, least(kPart, groups - g));
      int32_t part[kRows][kVectors * W];
      acc.store(part[0], kVectors * W);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors * W; ++j) total[i][j] += part[i][j];
      }
    }
    deliver<kRows, kVectors>(m, channel, [&](const Channels& c, float* to, int64_t stride) {
      for (int i = 0; i < kRows; ++i) {
        const QParams q = qparams[m + i];
        for (int j = 0; j < kVectors * W; ++j) {
          const int64_t offset = q.zero_point + Dot::kOffset;
          const float y = (static_cast<float>(total[i][j] - offset * c.sum[j]) * q.scale) * c.scale[j];
          to[i * stride + j] = c.bias != nullptr ? y + c.bias[j] : y;
        }
      }
    });
  }

 private:
  struct Channels {  // constants of a tile's channels
    const int32_t* sum;
    const float* scale;
    const float* bias;
  };

  template <typename T>
  static const T* padded(T* part, const T* from, int64_t n, int64_t width) {
    for (int64_t i = 0; i < width; ++i) part[i] = i < n ? from[i] : T(0);
    return part;
  }

  // Lets compute(constants, where, stride) write a tile of fp32, straight to the output where it is fp32 and the tile
  // ends before the last channel; then applies the epilogue and the cast.
  template <int kRows, int kVectors, typename Compute>
  DYNQUANT_INLINE void deliver(int64_t m, int64_t channel, const Compute& compute) const {
    constexpr int kWidth = kVectors * W;
    const int64_t n = least(kWidth, w.n - channel), at = m * out.stride + channel;
    Channels channels{w.sum + channel, w.scale + channel, w.bias == nullptr ? nullptr : w.bias + channel};
    int32_t sum[kWidth];
    float scale[kWidth], bias[kWidth], y[kRows * kWidth];
    const bool whole = n == kWidth;
    if (!whole) {  // vectors must not read beyond the last channel
      channels.sum = padded(sum, channels.sum, n, kWidth);
      channels.scale = padded(scale, channels.scale, n, kWidth);
      if (channels.bias != nullptr) channels.bias = padded(bias, channels.bias, n, kWidth);
    }
    float* direct = out.dtype == Dtype::kFloat32 ? static_cast<float*>(out.data) + at : nullptr;
    if (whole && direct != nullptr) {
      compute(channels, direct, out.stride);
      return apply_epilogue(out.epilogue, direct, out.stride, kRows, kWidth);
    }
    compute(channels, static_cast<float*>(y), kWidth);
    apply_epilogue(out.epilogue, y, kWidth, kRows, kWidth);
    switch (out.dtype) {
      case Dtype::kFloat32: return convert<kRows>(y, kWidth, n, direct);
      case Dtype::kBFloat16: return convert<kRows>(y, kWidth, n, static_cast<BFloat16*>(out.data) + at);
      case Dtype::kFloat16: return convert<kRows>(y, kWidth, n, static_cast<Half*>(out.data) + at);
    }
  }

  template <int kRows, typename T>
  void convert(const float* y, int64_t stride, int64_t n, T* to) const {
    for (int i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < n; j += W) {
        const F row = V::load(y + i * stride + j);
        T* at = to + i * out.stride + j;
        n - j >= W ? V::store(at, row) : store_part(at, row, n - j);
      }
    }
  }
};

struct Int8MmSink {
  Operand a;
  const Weight& w;
  int32_t* out;

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void finish(int64_t m, int64_t channel, const Accumulators<kRows, kVectors>& acc) const {
    const int64_t n = least(kVectors * W, w.n - channel);
    int32_t* row = out + m * w.n + channel;
    if (n == kVectors * W) {
      const I offset = V::broadcast(Dot::kOffset);
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const I taken = V::mul(offset, V::load(w.sum + channel + j * W));
        DYNQUANT_UNROLL
        for (int i = 0; i < kRows; ++i) V::store(row + i * w.n + j * W, V::sub(acc.acc[i][j], taken));
      }
      return;
    }
    int32_t sums[kRows][kVectors * W];
    acc.store(sums[0], kVectors * W);
    for (int i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < n; ++j) row[i * w.n + j] = sums[i][j] - Dot::kOffset * w.sum[channel + j];
    }
  }

  // An int32 result wraps and unwraps again: no parts needed.
  template <int kRows, int kVectors, typename Tile>
  void deep(int64_t m, int64_t channel, const Tile& weight) const {
    Accumulators<kRows, kVectors> acc;
    acc.add(a.data + m * a.stride, a.stride, weight, weight.b, (w.k + 3) / 4);
    finish(m, channel, acc);
  }
};

// Channels [c0, c1) of kRows rows, in tiles of kVectors vectors and, where fewer are left, of half as many.
template <int kRows, int kVectors, typename Sink>
void packed_tiles(const Sink& sink, int64_t m, int64_t c0, int64_t c1) {
  int64_t c = c0;
  for (; c + (kVectors - 1) * W < c1; c += kVectors * W) {
    const PackedTile<kVectors> weight(sink.w, c);
    if (sink.w.k > kMaxInt32K) {
      sink.template deep<kRows, kVectors>(m, c, weight);
    } else {
      Accumulators<kRows, kVectors> acc;
      acc.add(sink.a.data + m * sink.a.stride, sink.a.stride, weight, weight.b, (sink.w.k + 3) / 4);
      sink.finish(m, c, acc);
    }
  }
  if constexpr (kVectors > 1) {
    if (c < c1) packed_tiles<kRows, kVectors / 2>(sink, m, c, c1);
  }
}

// Calls body.template call<rows of the tile>(first row) for rows [m0, m1) in tiles of nearly equal height.
template <int kRows, typename Body>
void row_tile(int64_t m, int64_t rows, const Body& body) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return row_tile<kRows - 1>(m, rows, body);
  }
  body.template call<kRows>(m);
}

template <typename Body>
void for_row_tiles(int64_t m0, int64_t m1, const Body& body) {
  const int64_t rows = m1 - m0, tiles = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t from = m0 + rows * t / tiles;
    row_tile<kMaxRows>(from, m0 + rows * (t + 1) / tiles - from, body);
  }
}

template <typename Sink>
struct PackedBody {
  const Sink& sink;
  int64_t c0, c1;

  template <int kRows>
  void call(int64_t m) const {
    packed_tiles<kRows, tile_vectors<kRows>()>(sink, m, c0, c1);
  }
};

// ---- GEMM over widened weights: where a weight takes more than a load, and there are rows enough to share that -------
//
//   for a block of 64 channels             its accumulators of all rows: int32 scratch, where K takes more parts than one
//     for a part of at most kPartGroups    the part is widened once: 128 KB, it stays in L2
//       for a tile of rows                 its part of the operand stays in L1
//         for two vectors of channels

constexpr int kWidenedVectors = 2;  // a panel is at least that wide, so what lies beyond N is its padding
constexpr int64_t kWidenedChannels = kWidenedVectors * W, kWidenedTiles = kBlock / kWidenedChannels;
constexpr int64_t kWidenedRows = 13;  // rows from which on it pays
constexpr int64_t kPartGroups = 256;
using Widened = WidenedTile<kWidenedVectors>;

template <int kStep>
void widen_steps(const PackedTile<kWidenedVectors>& from, const int8_t* b, int8_t* to) {
  if constexpr (kStep < Dot::kSteps) {
    for (int j = 0; j < kWidenedVectors; ++j) {
      V::store(reinterpret_cast<int32_t*>(to + (kStep * kWidenedVectors + j) * Widened::kVectorBytes),
               from.template load<kStep>(b, j));
    }
    widen_steps<kStep + 1>(from, b, to);
  }
}

template <typename Sink>
struct WidenedBody {
  const Sink& sink;
  int8_t* widened;  // [tile of channels][kPartGroups] groups
  int32_t* sums;    // [rows][kBlock]
  int64_t first_row, c0, c1, group0, group1;

  void widen() const {
    for (int64_t c = c0; c < c1; c += kWidenedChannels) {
      const PackedTile<kWidenedVectors> from(sink.w, c);
      const int8_t* b = from.b + group0 * from.group_stride;
      int8_t* to = tile(c);
      for (int64_t g = group0; g < group1; ++g) {
        widen_steps<0>(from, b, to);
        b += from.group_stride;
        to += Widened::group_stride;
      }
    }
  }

  template <int kRows>
  void call(int64_t m) const {
    for (int64_t c = c0; c < c1; c += kWidenedChannels) {
      Accumulators<kRows, kWidenedVectors> acc;
      int32_t* stored = sums + (m - first_row) * kBlock + (c - c0);
      if (group0 > 0) acc.load(stored, kBlock);
      const uint8_t* a = sink.a.data + m * sink.a.stride + group0 * Dot::kGroupBytes;
      if (m ==
          first_row) {  // the next part, or the next panel, comes from memory while this one is multiplied
        const PackedTile<kWidenedVectors> packed(sink.w, c);
        acc.template add<true>(a, sink.a.stride, Widened(), tile(c), group1 - group0,
                               packed.b + group1 * packed.group_stride, packed.group_stride);
      } else {
        acc.add(a, sink.a.stride, Widened(), tile(c), group1 - group0);
      }
      if (group1 * 4 < sink.w.k) {
        acc.store(stored, kBlock);
      } else {
        sink.finish(m, c, acc);
      }
    }
  }

 private:
  int8_t* tile(int64_t c) const {
    return widened + (c - c0) / kWidenedChannels * kPartGroups * Widened::group_stride;
  }
};

bool is_widened(int64_t rows, int64_t k) {
  return Dot::kWidens && rows >= kWidenedRows && k <= kMaxInt32K && k > 0;
}

int64_t gemm_scratch(int64_t rows, int64_t k) {
  if (!is_widened(rows, k)) return 0;
  const int64_t sums = k > kPartGroups * 4 ? rows * kBlock * static_cast<int64_t>(sizeof(int32_t)) : 0;
  return kWidenedTiles * kPartGroups * Widened::group_stride + sums;
}

template <typename Sink>
void widened_gemm(const Sink& sink, int8_t* scratch, int64_t m0, int64_t m1, int64_t c0, int64_t c1) {
  int32_t* sums = reinterpret_cast<int32_t*>(scratch + kWidenedTiles * kPartGroups * Widened::group_stride);
  const int64_t groups = (sink.w.k + 3) / 4, parts = (groups + kPartGroups - 1) / kPartGroups;
  for (int64_t p = 0; p < parts; ++p) {
    const WidenedBody<Sink> body{
        sink, scratch, sums, m0, c0, c1, groups * p / parts, groups * (p + 1) / parts};
    body.widen();
    for_row_tiles(m0, m1, body);
  }
}

// ---- GEMM ------------------------------------------------------------------------------------------------------------

// A block of channels stays in L2 while all rows go by, and a tile's rows stay in L1 while the block's channels do.
template <typename Sink>
void gemm(const Sink& sink, int8_t* scratch, int64_t m0, int64_t m1, int64_t block0, int64_t block1) {
  const int64_t end = least(block1 * kBlock, sink.w.n);
  const int64_t width = m1 - m0 == 1 ? round_up(tile_vectors<1>() * W, kBlock) : kBlock;
  for (int64_t c0 = block0 * kBlock; c0 < end; c0 += width) {
    const int64_t c1 = least(c0 + width, end);
    if constexpr (Dot::kWidens) {
      if (is_widened(m1 - m0, sink.w.k)) {
        widened_gemm(sink, scratch, m0, m1, c0, c1);
        continue;
      }
    }
    for_row_tiles(m0, m1, PackedBody<Sink>{sink, c0, c1});
  }
}

void linear(Operand a, const QParams* qparams, const Weight& w, const Output& out, int8_t* scratch,
            int64_t m0, int64_t m1, int64_t block0, int64_t block1) {
  gemm(LinearSink{a, qparams, w, out}, scratch, m0, m1, block0, block1);
}

void int8_mm(Operand a, const Weight& w, int32_t* out, int8_t* scratch, int64_t m0, int64_t m1,
             int64_t block0, int64_t block1) {
  gemm(Int8MmSink{a, w, out}, scratch, m0, m1, block0, block1);
}
