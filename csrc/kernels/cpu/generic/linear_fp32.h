// Products with a float weight, as dynquant/reference/linear.py defines linear_fp32. Included by
// generic/kernels.h.

// Channels [n0, n0 + kBlock) of a weight, transposed: panel[k][kBlock], zeros beyond the last channel.
void transpose_panel(const Rows& w, int64_t n0, float* panel) {
  for (int64_t j = 0; j < kBlock; j += W) {
    const int64_t channels = w.m - (n0 + j);
    const auto transpose = [&](const auto* rows) {
      for (int64_t k = 0; k < w.k; k += W) {
        const int64_t count = least(W, w.k - k);
        F block[W];
        for (int i = 0; i < W; ++i) {
          block[i] = i < channels ? load_up_to(rows + i * w.stride + k, count) : V::broadcast(0.0f);
        }
        V::transpose(block);
        for (int64_t i = 0; i < count; ++i) V::store(panel + (k + i) * kBlock + j, block[i]);
      }
    };
    channels > 0 ? with_row(w, n0 + j, nullptr, transpose) : transpose(panel);
  }
}

// x [kRows][k] times kVectors vectors of a panel, of which `channels` channels are there. Each output is one
// chain of fma in the order of k.
template <int kRows, int kVectors>
void multiply_fp32(const float* x, const uint8_t* finite, int64_t k, const float* panel, const float* bias,
                   float* out, int64_t stride, int64_t channels) {
  F acc[kRows][kVectors];
  DYNQUANT_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = finite[i] != 0 ? V::load(bias + j * W) : V::broadcast(__builtin_nanf(""));
    }
  }
  for (int64_t t = 0; t < k; ++t) {
    F weight[kVectors];
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) weight[j] = V::load(panel + t * kBlock + j * W);
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const F value = V::broadcast(x[i * k + t]);
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = V::fma(value, weight[j], acc[i][j]);
    }
  }
  DYNQUANT_UNROLL
  for (int i = 0; i < kRows; ++i) {
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const int64_t count = least(W, channels - j * W);
      if (count > 0) store_up_to(out + i * stride + j * W, acc[i][j], count);
    }
  }
}

template <int kRows, int kVectors>
void multiply_fp32_panel(const float* x, const uint8_t* finite, int64_t k, const float* panel,
                         const float* bias, float* out, int64_t stride, int64_t channels) {
  for (int64_t j = 0; j < kBlock; j += kVectors * W) {
    multiply_fp32<kRows, kVectors>(x, finite, k, panel + j, bias + j, out + j, stride, channels - j);
  }
}

// Floats: the rows of x, a panel, and whether each row is finite.
int64_t linear_fp32_scratch(int64_t m, int64_t k) { return (m + kBlock) * k + (m + 3) / 4; }

void linear_fp32(const Rows& x, const FloatLayer& layer, float* out, float* scratch, int64_t block0,
                 int64_t block1) {
  // Accumulators fill the registers: 24 of 32, or 12 of 16.
  constexpr int kRows = 6, kVectors = W == 16 ? 4 : 2;
  constexpr int kVectorsOfRow = kBlock / W < 8 ? kBlock / W : 8;
  const Rows& w = layer.weight;
  const int64_t k = x.k, n = w.m;
  float *rows = scratch, *panel = rows + x.m * k;
  uint8_t* finite = reinterpret_cast<uint8_t*>(panel + kBlock * k);
  Rows plain = x;
  plain.rotation = {1, false};  // the identity: converts any dtype to fp32
  for (int64_t m = 0; m < x.m; ++m) {
    rotate(plain, m, rows + m * k);
    const Range range = span_range(rows + m * k, k);
    finite[m] = range.lo - range.lo == 0.0f && range.hi - range.hi == 0.0f;
  }
  for (int64_t n0 = block0 * kBlock; n0 < least(block1 * kBlock, n); n0 += kBlock) {
    transpose_panel(w, n0, panel);
    const int64_t channels = least(kBlock, n - n0);
    float bias[kBlock] = {};
    if (layer.bias != nullptr) __builtin_memcpy(bias, layer.bias + n0, channels * sizeof(float));
    int64_t m = 0;
    for (; m + kRows <= x.m; m += kRows) {
      multiply_fp32_panel<kRows, kVectors>(rows + m * k, finite + m, k, panel, bias, out + m * n + n0, n,
                                           channels);
    }
    for (; m < x.m; ++m) {
      multiply_fp32_panel<1, kVectorsOfRow>(rows + m * k, finite + m, k, panel, bias, out + m * n + n0, n,
                                            channels);
    }
  }
}
