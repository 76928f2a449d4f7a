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
//   zmm: 6 x 4 = 24 accumulators + 4 b + 1 a of 32 registers; ymm: 6 x 2 = 12 + 2 b + 1 a of 16 with VNNI, 2 x 4 with
//   AVX2. 1 and 2 rows are bound by the reading of the weight: tiles as wide as the registers allow, so that each panel
//   is read in few passes and the chains of additions are enough to hide their latency (Dot::kVectors).

// Where a tile's weight vectors come from: one after the other in a panel that is as wide as the tile ...
template <int kVectors>
struct WidePanel {
  static constexpr bool kFlipped = false;

  const int8_t* b;  // vector 0, group 0
  int64_t group_stride, groups, ahead;

  // Further ahead than the hardware looks: from L3, or from memory.
  DYNQUANT_INLINE WidePanel(const Weight& w, int64_t channel)
      : group_stride(w.panel * 4), groups((w.k + 3) / 4), ahead(w.n * w.k > (8 << 20) ? 16384 : 4096) {
    const int64_t in_panel = channel & (w.panel - 1);  // a panel's width is a power of two
    b = w.packed + (channel - in_panel) * groups * 4 + in_panel * 4;
  }

  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group) + j * W);
  }

  // One row reads a weight once, and a narrow tile only some of its lines at a time.
  template <int kRows>
  DYNQUANT_INLINE void fetch_ahead(const int8_t* group) const {
    if constexpr (kRows == 1 || Dot::kPartGroups > 0) fetch_lines<3>(group + ahead);
  }

 protected:
  template <int kLocality>
  DYNQUANT_INLINE static void fetch_lines(const int8_t* at) {
    for (int64_t line = 0; line < kVectors * W * 4; line += 64) __builtin_prefetch(at + line, 0, kLocality);
  }
};

// ... of which a part of K is worked on, while the same lines of the next part come to L2.
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

// ... or from several narrower ones, which lie apart.
template <int kVectors>
struct NarrowPanels {
  static constexpr bool kFlipped = false;

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

// ... or from a copy in which a tile has its cache lines side by side: those of a wider panel would share L1's sets.
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

template <int kRows, int kVectors>
struct Accumulators {
  I acc[kRows][kVectors];

  // Row i starts from start[i] in all channels.
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

  // Adds the products of a group: the rows' at a, the channels' at b.
  template <typename... Steps, typename Tile>
  DYNQUANT_INLINE void add_group(Products<Steps...>, const uint8_t* a, int64_t a_stride, const Tile& w,
                                 const int8_t* b) {
    (add_step<Steps>(a, a_stride, w, b), ...);
  }

  // Adds the products of a group and the one behind it, by a step that takes two.
  template <typename Step, typename Tile>
  DYNQUANT_INLINE void add_two_groups(const uint8_t* a, int64_t a_stride, const Tile& w, const int8_t* b) {
    I operands[kRows][2];
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      operands[i][0] = broadcast_operand(a + i * a_stride);
      operands[i][1] = broadcast_operand(a + i * a_stride + Dot::kGroupBytes);
    }
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const I w0 = weight<Step>(w, b, j), w1 = weight<Step>(w, b + w.group_stride, j);
      if constexpr (kRows == 1) {
        Step::multiply_add_two(acc[0][j], operands[0], w0, w1);
      } else {
        static_assert(kRows == 2);
        Step::multiply_add_two(acc[0][j], acc[1][j], operands[0], operands[1], w0, w1);
      }
    }
  }

  // Adds `groups` groups from a and b on, whatever they hold.
  template <typename Tile>
  DYNQUANT_INLINE void add(const uint8_t* a, int64_t a_stride, const Tile& w, const int8_t* b,
                           int64_t groups) {
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
    if constexpr (Tile::kFlipped) {
      return Step::weight_of_flipped(w.load(b, j));
    } else {
      return Step::weight(w.load(b, j));
    }
  }

  DYNQUANT_INLINE static I broadcast_operand(const uint8_t* a) {
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
      const I av = broadcast_operand(a + i * a_stride + Step::kOperandAt);
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Step::multiply_add(acc[i][j], av, bv[j]);
    }
  }
};

// The one dequantization formula, of accumulators of q + operand_offset. Vectors: constants of W channels that may be
// read whole.
template <int kRows, int kVectors>
DYNQUANT_INLINE void dequantize(const Accumulators<kRows, kVectors>& tile, const QParams* qparams,
                                int32_t operand_offset, const int32_t* sum, const float* scale,
                                const float* bias, float* out, int64_t stride) {
  DYNQUANT_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    const I sums = V::load(sum + j * W);
    const F scales = V::load(scale + j * W);
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const I offset = V::broadcast(qparams[i].zero_point + operand_offset);
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

// The lines that a tile of kRows rows and `bytes` bytes each will be written to come to L1 while it is multiplied: a
// store that misses would hold up those behind it.
template <int kRows>
DYNQUANT_INLINE void fetch_rows(const uint8_t* at, int64_t stride, int64_t bytes) {
  DYNQUANT_UNROLL
  for (int i = 0; i < kRows; ++i) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + i * stride + line, 1, 3);
  }
}

// What is done with the accumulators of a tile: dequantized to the output, or kept as they are.
struct LinearSink {
  Operand a;
  const QParams* qparams;
  const Weight& w;
  const Output& out;

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void fetch(int64_t m, int64_t channel) const {
    const int64_t size = out.dtype == Dtype::kFloat32 ? 4 : 2;
    const uint8_t* at = static_cast<const uint8_t*>(out.data) + (m * out.stride + channel) * size;
    fetch_rows<kRows>(at, out.stride * size, kVectors * W * size);
  }

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void finish(int64_t m, int64_t channel, const Accumulators<kRows, kVectors>& acc,
                              int32_t operand_offset) const {
    deliver<kRows, kVectors>(m, channel, [&](const Channels& c, float* to, int64_t stride) {
      dequantize(acc, qparams + m, operand_offset, c.sum, c.scale, c.bias, to, stride);
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
  DYNQUANT_INLINE void fetch(int64_t m, int64_t channel) const {
    fetch_rows<kRows>(reinterpret_cast<const uint8_t*>(out + m * w.n + channel), w.n * 4, kVectors * W * 4);
  }

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void finish(int64_t m, int64_t channel, const Accumulators<kRows, kVectors>& acc,
                              int32_t operand_offset) const {
    const int64_t n = least(kVectors * W, w.n - channel);
    int32_t* row = out + m * w.n + channel;
    if (n == kVectors * W) {
      const I offset = V::broadcast(operand_offset);
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
      for (int64_t j = 0; j < n; ++j) row[i * w.n + j] = sums[i][j] - operand_offset * w.sum[channel + j];
    }
  }

  // An int32 result wraps and unwraps again: no parts needed.
  template <int kRows, int kVectors, typename Tile>
  void deep(int64_t m, int64_t channel, const Tile& weight) const {
    Accumulators<kRows, kVectors> acc;
    acc.add(a.data + m * a.stride, a.stride, weight, weight.b, (w.k + 3) / 4);
    finish(m, channel, acc, Dot::kOffset);
  }
};

// What a plan's steps fetch meanwhile: here nothing, over gathered weights FetchEvenly.
struct FetchNothing {
  DYNQUANT_INLINE void over(int64_t) {}
  DYNQUANT_INLINE void step() {}
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

// Rows [m, m + kRows) of row tile t and channels [c0, c1), in tiles of kVectors vectors and, where fewer are left, of
// half as many.
template <int kRows, int kVectors, typename Sink>
void gemm_tiles(const Sink& sink, int64_t t, int64_t m, int64_t c0, int64_t c1) {
  int64_t c = c0;
  for (; c + (kVectors - 1) * W < c1; c += kVectors * W) {
    if (sink.w.k > kMaxInt32K) {
      sink.template deep<kRows, kVectors>(m, c, NarrowPanels<kVectors>(sink.w, c));
    } else if (sink.w.panel >= kVectors * W) {
      gemm_tile<kRows, kVectors>(sink, WidePanel<kVectors>(sink.w, c), t, m, c);
    } else {
      gemm_tile<kRows, kVectors>(sink, NarrowPanels<kVectors>(sink.w, c), t, m, c);
    }
  }
  if constexpr (kVectors > 1) {
    if (c < c1) gemm_tiles<kRows, kVectors / 2>(sink, t, m, c, c1);
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
  const TileRows cut(tiles.m);
  for (int64_t t = tiles.begin, m = cut.first(t); t < tiles.end; ++t) {
    const int64_t next = cut.first(t + 1);
    call_with_rows<Dot::kMaxRows>(body, t, m, next - m);
    m = next;
  }
}

template <typename Sink>
struct PackedBody {
  const Sink& sink;
  int64_t c0, c1;

  template <int kRows>
  void call(int64_t t, int64_t m) const {
    gemm_tiles<kRows, Dot::kVectors<kRows>>(sink, t, m, c0, c1);
  }
};

constexpr int kWideVectors = Dot::kVectors<Dot::kMaxRows>;
constexpr int64_t kWidth = kWideVectors * W;  // channels of a tile of many rows

// ---- GEMM by plans, over gathered weights --------------------------------------------------------------------------
//
//   for a block of 64 channels
//     for a part of K                its weights are gathered once, a tile's side by side
//       for a tile of channels       its weights stay in L1 while all rows go by
//         for a tile of rows         as planned; the accumulators wait in scratch for the next part

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
    const TileRows cut(tiles.m);
    const int64_t groups = (sink.w.k + 3) / 4, part = D::groups_of_part(groups);
    const int64_t first_row = cut.first(tiles.begin), rows = cut.first(tiles.end) - first_row;
    for (int64_t g = 0; g < groups; g += part) {
      Body body{sink, scratch, tiles, block, groups, first_row, rows, g, least(groups, g + part), 0};
      body.gather();
      for (; body.tile < Body::kTiles; ++body.tile) for_row_tiles(tiles, body);
    }
  }
}

// ---- GEMM of few rows by parts of K --------------------------------------------------------------------------------
//
//   for a block of 64 channels
//     for a part of K                its weights stay in L1: narrow tiles pass over them several times
//       for a tile of rows
//         for a tile of channels     the accumulators wait in scratch for the next part

// Up to K = 1024 a block's weights come from L2 as fast.
constexpr bool takes_parts(int64_t m, int64_t k) {
  return Dot::kPartGroups > 0 && 1 < m && m <= 4 * Dot::kMaxRows && 1024 < k && k <= kMaxInt32K;
}

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
                      TileRows(tiles.m).first(tiles.begin),
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

// ---- GEMM ----------------------------------------------------------------------------------------------------------

template <typename D = Dot>
int64_t gemm_scratch(int64_t m, int64_t k, int64_t rows) {
  if constexpr (D::kPlans) return m > kFewRows ? GatheredBody<LinearSink, D, false>::scratch_bytes(rows) : 0;
  return takes_parts(m, k) ? rows * kBlock * 4 : 0;
}

// Whether the first tile's products take w + 128: most of the others' do then.
template <typename D = Dot>
bool takes_flipped(Operand a, RowTiles tiles) {
  if constexpr (D::kPlans) return tiles.begin < tiles.end && D::takes_flipped(plan_of<D>(a, tiles.begin));
  return false;
}

// A tile's weights stay in L1, or in L2 where K is large, while all rows go by.
template <typename Sink>
void gemm(const Sink& sink, int8_t* scratch, RowTiles tiles, int64_t block0, int64_t block1) {
  const int64_t end = least(block1 * kBlock, sink.w.n);
  const bool gathers = sink.a.plan_stride > 0 && sink.w.panel == kBlock;
  const bool flips = gathers && takes_flipped(sink.a, tiles);
  const bool parts = takes_parts(tiles.m, sink.w.k) && sink.w.panel == kBlock;
  const int64_t width = gathers || parts ? kBlock : tiles.m == 1 ? Dot::kVectors<1> * W : kWidth;
  for (int64_t c = block0 * kBlock; c < end; c += width) {
    if (gathers) {
      flips ? gemm_gathered<true>(sink, scratch, tiles, c) : gemm_gathered<false>(sink, scratch, tiles, c);
    } else if (parts) {
      gemm_parts(sink, scratch, tiles, c);
    } else {
      for_row_tiles(tiles, PackedBody<Sink>{sink, c, least(c + width, end)});
    }
  }
}

void linear(Operand a, const QParams* qparams, const Weight& w, const Output& out, int8_t* scratch,
            RowTiles tiles, int64_t block0, int64_t block1) {
  gemm(LinearSink{a, qparams, w, out}, scratch, tiles, block0, block1);
}

void int8_mm(Operand a, const Weight& w, int32_t* out, int8_t* scratch, RowTiles tiles, int64_t block0,
             int64_t block1) {
  gemm(Int8MmSink{a, w, out}, scratch, tiles, block0, block1);
}
