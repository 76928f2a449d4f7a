// LayerNorm and RMSNorm of fp32 rows, as dynquant/reference/norm.py defines them, with the addition of a
// residual before and the product of a gate. Included by generic/kernels.h.

constexpr int kSumLanes = 16;
constexpr int kSumVectors = kSumLanes / W;

// Rows that are summed side by side: the additions of one row depend on each other.
constexpr int kNormRows = 4;

// Sums of kRows rows: lane l of a row adds its elements l, l + 16, ... in order.
template <int kRows>
struct RowSums {
  F lanes[kRows][kSumVectors];

  DYNQUANT_INLINE RowSums() {
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      DYNQUANT_UNROLL
      for (int j = 0; j < kSumVectors; ++j) lanes[i][j] = V::broadcast(0.0f);
    }
  }

  // Halves the lanes: 0-7 add 8-15, 0-3 add 4-7, 0-1 add 2-3, 0 adds 1.
  DYNQUANT_INLINE float of_row(int i) const {
    float sum[kSumLanes];
    for (int j = 0; j < kSumVectors; ++j) V::store(sum + j * W, lanes[i][j]);
    for (int width = kSumLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
    }
    return sum[0];
  }
};

// Calls body(row, lane vector, element, number of elements up to W) for each vector of kRows rows.
template <int kRows, typename Body>
DYNQUANT_INLINE void for_row_vectors(int64_t n, const Body& body) {
  int64_t at = 0;
  for (; at + kSumLanes <= n; at += kSumLanes) {
    DYNQUANT_UNROLL
    for (int j = 0; j < kSumVectors; ++j) {
      DYNQUANT_UNROLL
      for (int i = 0; i < kRows; ++i) body(i, j, at + j * W, W);
    }
  }
  for (int j = 0; at < n; ++j, at += W) {
    for (int i = 0; i < kRows; ++i) body(i, j, at, least(W, n - at));
  }
}

// The first `count` lanes of x, and zeros.
DYNQUANT_INLINE F first_lanes(F x, int64_t count) {
  if (count >= W) return x;
  float lanes[W];
  V::store(lanes, x);
  return load_up_to(lanes, count);
}

struct NormRows {
  const float* y;
  int64_t y_stride;
  float* sum;  // y + residual, rows of n elements; not written without a residual
  int64_t n;
  const Norm& norm;

  // y + residual, and for a LayerNorm the mean of the result.
  template <int kRows, typename T>
  void add(const T* residual, int64_t stride, float* mean) const {
    RowSums<kRows> sums;
    for_row_vectors<kRows>(n, [&](int i, int j, int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
      F v = load_up_to(y + i * y_stride + at, count);
      if (residual != nullptr) {
        v = V::add(v, load_up_to(residual + i * stride + at, count));
        store_up_to(sum + i * n + at, v, count);
      }
      sums.lanes[i][j] = V::add(sums.lanes[i][j], first_lanes(v, count));
    });
    if (norm.kind != NormKind::kLayer) return;
    for (int i = 0; i < kRows; ++i) mean[i] = sums.of_row(i) / static_cast<float>(n);
  }

  // 1 / sqrt(mean square of values - mean, + eps).
  template <int kRows>
  void inverse_roots(const float* values, int64_t stride, const float* mean, float* inverse_root) const {
    RowSums<kRows> squares;
    F means[kRows];
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) means[i] = V::broadcast(mean[i]);
    const bool centers = norm.kind == NormKind::kLayer;
    for_row_vectors<kRows>(n, [&](int i, int j, int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
      F d = load_up_to(values + i * stride + at, count);
      if (centers) d = V::sub(d, means[i]);
      squares.lanes[i][j] = V::add(squares.lanes[i][j], first_lanes(V::mul(d, d), count));
    });
    for (int i = 0; i < kRows; ++i) {
      const float variance = squares.of_row(i) / static_cast<float>(n);
      inverse_root[i] = 1.0f / __builtin_sqrtf(variance + norm.eps);
    }
  }

  template <int kRows, typename T>
  void write(const float* values, int64_t stride, const float* mean, const float* inverse_root, T* out,
             int64_t out_stride) const {
    const bool centers = norm.kind == NormKind::kLayer, scales = norm.kind != NormKind::kNone;
    for_row_vectors<kRows>(n, [&](int i, int, int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
      F v = load_up_to(values + i * stride + at, count);
      if (centers) v = V::sub(v, V::broadcast(mean[i]));
      if (scales) v = V::mul(v, V::broadcast(inverse_root[i]));
      if (norm.weight != nullptr) v = V::mul(v, load_up_to(norm.weight + at, count));
      if (norm.bias != nullptr) v = V::add(v, load_up_to(norm.bias + at, count));
      store_up_to(out + i * out_stride + at, v, count);
    });
  }
};

// Calls body(pointer to row m of the output).
template <typename Body>
void with_output_row(const Destination& out, int64_t m, const Body& body) {
  const int64_t at = m * out.stride;
  switch (out.dtype) {
    case Dtype::kFloat32: return body(static_cast<float*>(out.data) + at);
    case Dtype::kBFloat16: return body(static_cast<BFloat16*>(out.data) + at);
    case Dtype::kFloat16: return body(static_cast<Float16*>(out.data) + at);
    case Dtype::kInt32: return;  // never of floats
  }
}

template <int kRows>
void add_norm_rows(const float* y, int64_t stride, const Rows* residual, float* sum, const Norm& norm,
                   int64_t m, int64_t n, const Destination& out) {
  const NormRows rows{y + m * stride, stride, sum == nullptr ? nullptr : sum + m * n, n, norm};
  float mean[kRows] = {}, inverse_root[kRows] = {};
  const float* values = rows.y;
  int64_t values_stride = stride;
  if (residual != nullptr) {
    with_row(*residual, m, nullptr,
             [&](const auto* data) { rows.template add<kRows>(data, residual->stride, mean); });
    values = rows.sum;
    values_stride = n;
  } else if (norm.kind == NormKind::kLayer) {
    rows.template add<kRows>(static_cast<const float*>(nullptr), 0, mean);
  }
  if (norm.kind != NormKind::kNone) {
    rows.template inverse_roots<kRows>(values, values_stride, mean, inverse_root);
  }
  with_output_row(out, m, [&](auto* to) {
    rows.template write<kRows>(values, values_stride, mean, inverse_root, to, out.stride);
  });
}

void add_norm(const float* y, int64_t stride, const Rows* residual, float* sum, const Norm& norm, int64_t m,
              int64_t n, const Destination& out) {
  int64_t i = 0;
  for (; i + kNormRows <= m; i += kNormRows) {
    add_norm_rows<kNormRows>(y, stride, residual, sum, norm, i, n, out);
  }
  for (; i < m; ++i) add_norm_rows<1>(y, stride, residual, sum, norm, i, n, out);
}

void multiply(float* y, const float* by, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    const int64_t left = count - i;
    store_up_to(y + i, V::mul(load_up_to(by + i, left), load_up_to(y + i, left)), left);
  }
}
