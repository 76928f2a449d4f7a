// From the accumulators of a tile to the output: dequantization and epilogue, or int32. Included by
// generic/kernels.h.

// (acc * scale) * row_scale + bias, the last two rounded as one.
DYNQUANT_INLINE F dequantized(F acc, const float* scale, F row_scale, const float* bias) {
  const F product = V::mul(acc, V::load(scale));
  return bias != nullptr ? V::fma(product, row_scale, V::load(bias)) : V::mul(product, row_scale);
}

// The dequantization formula, for accumulators of q + activation_offset. The channel constants are read in
// whole vectors.
template <int kRows, int kVectors>
DYNQUANT_INLINE void dequantize(const Accumulators<kRows, kVectors>& tile, const QParams* qparams,
                                int32_t activation_offset, const int32_t* sum, const float* scale,
                                const float* bias, float* out, int64_t stride) {
  I sums[kVectors];
  DYNQUANT_UNROLL
  for (int j = 0; j < kVectors; ++j) sums[j] = Dot::ZeroPointCompensation::prepare_sums(V::load(sum + j * W));
  DYNQUANT_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const I offset = Dot::ZeroPointCompensation::prepare_offset(qparams[i].zero_point + activation_offset);
    const F row_scale = V::broadcast(qparams[i].scale);
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const F acc = V::convert(Dot::ZeroPointCompensation::subtract(tile.acc[i][j], offset, sums[j]));
      const F y = dequantized(acc, scale + j * W, row_scale, bias == nullptr ? nullptr : bias + j * W);
      V::store(out + i * stride + j * W, y);
    }
  }
}

#include "epilogue_math.h"

template <Epilogue kEpilogue>
DYNQUANT_INLINE F epilogue_of(F x) {
  using Math = EpilogueMath<V>;
#define DYNQUANT_RETURN(name, function) \
  if constexpr (kEpilogue == Epilogue::name) return Math::function(x);
  DYNQUANT_ACTIVATIONS(DYNQUANT_RETURN)
#undef DYNQUANT_RETURN
}

template <Epilogue kEpilogue>
void apply_epilogue_to(float* y, int64_t stride, int rows, int64_t width) {
  for (int i = 0; i < rows; ++i) {
    float* row = y + i * stride;
    for (int64_t j = 0; j < width; j += W) V::store(row + j, epilogue_of<kEpilogue>(V::load(row + j)));
  }
}

// In place; width is a multiple of W.
void apply_epilogue(Epilogue epilogue, float* y, int64_t stride, int rows, int64_t width) {
  switch (epilogue) {
    case Epilogue::kNone: return;
#define DYNQUANT_CASE(name, function) \
  case Epilogue::name: return apply_epilogue_to<Epilogue::name>(y, stride, rows, width);
      DYNQUANT_ACTIVATIONS(DYNQUANT_CASE)
#undef DYNQUANT_CASE
  }
}

// Prefetches the output lines of a tile (kRows rows of `bytes` bytes) to L1 before its products: a store that
// misses would hold up the ones behind it.
template <int kRows>
DYNQUANT_INLINE void fetch_rows(const uint8_t* at, int64_t stride, int64_t bytes) {
  DYNQUANT_UNROLL
  for (int i = 0; i < kRows; ++i) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + i * stride + line, 1, 3);
  }
}

struct LinearOutput {
  PackedActivations a;
  const QParams* qparams;
  const Weight& w;
  const Destination& out;

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void fetch(int64_t m, int64_t channel) const {
    const int64_t size = out.dtype == Dtype::kFloat32 ? 4 : 2;
    const uint8_t* at = static_cast<const uint8_t*>(out.data) + (m * out.stride + channel) * size;
    fetch_rows<kRows>(at, out.stride * size, kVectors * W * size);
  }

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void finish(int64_t m, int64_t channel, const Accumulators<kRows, kVectors>& acc,
                              int32_t activation_offset) const {
    deliver<kRows, kVectors>(m, channel, [&](const Channels& c, float* to, int64_t stride) {
      dequantize(acc, qparams + m, activation_offset, c.sum, c.scale, c.bias, to, stride);
    });
  }

  // For K beyond the range of int32: partial sums in int32, added in int64.
  template <int kRows, int kVectors, typename Tile>
  void wide_accumulate(int64_t m, int64_t channel, const Tile& weight) const {
    constexpr int64_t kPart = kMaxInt32K / 4;
    const int64_t groups = (w.k + 3) / 4;
    int64_t total[kRows][kVectors * W] = {};
    for (int64_t g = 0; g < groups; g += kPart) {
      Accumulators<kRows, kVectors> acc;
      acc.add(a.data + m * a.stride + g * Dot::kGroupBytes, a.stride, weight,
              weight.b + g * weight.group_stride, least(kPart, groups - g));
      int32_t partial[kRows][kVectors * W];
      acc.store(partial[0], kVectors * W);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors * W; ++j) total[i][j] += partial[i][j];
      }
    }
    deliver<kRows, kVectors>(m, channel, [&](const Channels& c, float* to, int64_t stride) {
      for (int i = 0; i < kRows; ++i) {
        const int64_t offset = qparams[m + i].zero_point + Dot::kOffset;
        const F row_scale = V::broadcast(qparams[m + i].scale);
        for (int j = 0; j < kVectors * W; j += W) {
          float rounded[W];
          for (int lane = 0; lane < W; ++lane) {
            rounded[lane] = static_cast<float>(total[i][j + lane] - offset * c.sum[j + lane]);
          }
          const float* bias = c.bias == nullptr ? nullptr : c.bias + j;
          V::store(to + i * stride + j, dequantized(V::load(rounded), c.scale + j, row_scale, bias));
        }
      }
    });
  }

 private:
  struct Channels {  // constants of the channels of a tile
    const int32_t* sum;
    const float* scale;
    const float* bias;
  };

  template <typename T>
  static const T* padded(T* to, const T* from, int64_t n, int64_t width) {
    for (int64_t i = 0; i < width; ++i) to[i] = i < n ? from[i] : T(0);
    return to;
  }

  // Has compute(constants, destination, stride) write a tile of fp32, directly to the output if that is fp32
  // and the tile is whole; then applies the epilogue and the cast.
  template <int kRows, int kVectors, typename Compute>
  DYNQUANT_INLINE void deliver(int64_t m, int64_t channel, const Compute& compute) const {
    constexpr int kWidth = kVectors * W;
    const int64_t n = least(kWidth, w.n - channel), at = m * out.stride + channel;
    Channels channels{w.sum + channel, w.scale + channel, w.bias == nullptr ? nullptr : w.bias + channel};
    int32_t sum[kWidth];
    float scale[kWidth], bias[kWidth], y[kRows * kWidth];
    const bool whole = n == kWidth;
    if (!whole) {  // whole vectors would read beyond the last channel
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
      case Dtype::kFloat16: return convert<kRows>(y, kWidth, n, static_cast<Float16*>(out.data) + at);
      case Dtype::kInt32: return;  // only of Int8MmOutput
    }
  }

  template <int kRows, typename T>
  void convert(const float* y, int64_t stride, int64_t n, T* to) const {
    for (int i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < n; j += W) {
        const F row = V::load(y + i * stride + j);
        T* at = to + i * out.stride + j;
        store_up_to(at, row, n - j);
      }
    }
  }
};

struct Int8MmOutput {
  PackedActivations a;
  const Weight& w;
  int32_t* out;

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void fetch(int64_t m, int64_t channel) const {
    fetch_rows<kRows>(reinterpret_cast<const uint8_t*>(out + m * w.n + channel), w.n * 4, kVectors * W * 4);
  }

  template <int kRows, int kVectors>
  DYNQUANT_INLINE void finish(int64_t m, int64_t channel, const Accumulators<kRows, kVectors>& acc,
                              int32_t activation_offset) const {
    const int64_t n = least(kVectors * W, w.n - channel);
    int32_t* row = out + m * w.n + channel;
    if (n == kVectors * W) {
      const I offset = V::broadcast(activation_offset);
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
      for (int64_t j = 0; j < n; ++j) row[i * w.n + j] = sums[i][j] - activation_offset * w.sum[channel + j];
    }
  }

  // Intermediate wrap-around cancels because the final sum fits int32; no split needed.
  template <int kRows, int kVectors, typename Tile>
  void wide_accumulate(int64_t m, int64_t channel, const Tile& weight) const {
    Accumulators<kRows, kVectors> acc;
    acc.add(a.data + m * a.stride, a.stride, weight, weight.b, (w.k + 3) / 4);
    finish(m, channel, acc, Dot::kOffset);
  }
};
