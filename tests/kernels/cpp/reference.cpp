#include "reference.h"

namespace kernel_tests {
namespace {

#define DYNQUANT_INLINE inline
#include "epilogue_math.h"

// One lane. volatile: the compiler contracts nothing.
struct OneLane {
  using F = float;
  using I = int32_t;

  static F once(F x) {
    volatile F rounded = x;
    return rounded;
  }
  static F broadcast(float x) { return x; }
  static I broadcast(int32_t x) { return x; }
  static F add(F a, F b) { return once(a + b); }
  static F sub(F a, F b) { return once(a - b); }
  static F mul(F a, F b) { return once(a * b); }
  static F div(F a, F b) { return once(a / b); }
  static F fma(F a, F b, F c) { return std::fma(a, b, c); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static I bit_and(I a, I b) { return a & b; }
  template <int count>
  static I shift_left(I a) {
    return static_cast<I>(static_cast<uint32_t>(a) << count);
  }
  static I as_int(F x) { return bit_cast<I>(x); }
  static F as_float(I x) { return bit_cast<F>(x); }
};

}  // namespace

std::vector<uint8_t> encode(const Floats& x, Dtype dtype) {
  const int64_t size = dynquant::element_size(dtype);
  std::vector<uint8_t> bytes(x.size() * index(size));
  for (size_t i = 0; i < x.size(); ++i) {
    if (dtype == Dtype::kFloat32) {
      std::memcpy(&bytes[i * 4], &x[i], 4);
    } else {
      const uint16_t bits = dtype == Dtype::kBFloat16 ? bfloat16_of(x[i]) : float16_of(x[i]);
      std::memcpy(&bytes[i * 2], &bits, 2);
    }
  }
  return bytes;
}

float decode(const uint8_t* data, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    float x;
    std::memcpy(&x, data + i * 4, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, data + i * 2, 2);
  return dtype == Dtype::kBFloat16 ? float_of_bfloat16(bits) : float_of_float16(bits);
}

void rotate_row(float* x, int64_t k, Rotation rotation) {
  const auto [block, signs] = rotation;
  for (int64_t i = 0; signs && i < k; ++i) {
    // Pairs of adjacent ones among the binary digits, counted one by one.
    int pairs = 0;
    for (int64_t at = i % block; at > 1; at /= 2) pairs += at % 4 == 3 ? 1 : 0;
    if (pairs % 2 == 1) x[i] = -x[i];
  }
  for (int stride = 1; stride < block; stride *= 2) {
    for (int64_t i = 0; i < k; ++i) {
      if ((i & stride) != 0) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
}

Range range_of(const float* x, int64_t count) {
  Range range{0.0f, 0.0f};
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(x[i])) return Range{NAN, NAN};
    range = Range{std::min(range.lo, x[i]), std::max(range.hi, x[i])};
  }
  return range;
}

QParams qparams_of(Range range) {
  if (!std::isfinite(range.lo) || !std::isfinite(range.hi)) return QParams{NAN, 0};
  const float scale = std::max(range.hi / 255.0f - range.lo / 255.0f, 0x1p-126f);
  const float zero_point = std::nearbyint(-128.0f - range.lo * (1.0f / scale));
  return QParams{scale, static_cast<int32_t>(std::clamp(zero_point, -128.0f, 127.0f))};
}

int8_t quantize_value(float x, QParams qparams) {
  if (std::isnan(qparams.scale)) return 0;
  const float exact = x * (1.0f / qparams.scale), zero_point = static_cast<float>(qparams.zero_point);
  if (std::isnan(exact)) return 0;
  const float steps = std::clamp(exact, -128.0f - zero_point, 127.0f - zero_point);
  return static_cast<int8_t>(static_cast<int32_t>(std::nearbyint(steps)) + qparams.zero_point);
}

float weight_scale_of(float magnitude) {
  return magnitude == 0.0f ? 1.0f : std::max(magnitude / 127.0f, 0x1p-126f);
}

int8_t quantize_weight_value(float w, float scale) {
  return static_cast<int8_t>(std::nearbyint(std::clamp(w / scale, -127.0f, 127.0f)));
}

Bytes pack(const Bytes& weight, int64_t n, int64_t k, int64_t panel) {
  const int64_t panels = (n + panel - 1) / panel, groups = (k + 3) / 4;
  Bytes packed(index(panels * groups * panel * 4));
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t i = 0; i < k; ++i) {
      packed[index(((c / panel * groups + i / 4) * panel + c % panel) * 4 + i % 4)] =
          weight[index(c * k + i)];
    }
  }
  return packed;
}

std::vector<int32_t> row_sums(const Bytes& weight, int64_t n, int64_t k) {
  std::vector<int32_t> sums(index(n));
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t i = 0; i < k; ++i) sums[index(c)] += weight[index(c * k + i)];
  }
  return sums;
}

std::vector<int64_t> multiply(const Bytes& q, const Bytes& weight, int64_t m, int64_t n, int64_t k) {
  std::vector<int64_t> out(index(m * n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      int64_t sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += static_cast<int>(q[index(i * k + j)]) * weight[index(c * k + j)];
      out[index(i * n + c)] = sum;
    }
  }
  return out;
}

float epilogue_of(Epilogue epilogue, float x) {
  using Math = EpilogueMath<OneLane>;
  switch (epilogue) {
    case Epilogue::kNone: return x;
#define DYNQUANT_CASE(name, function) \
  case Epilogue::name: return Math::function(x);
      DYNQUANT_ACTIVATIONS(DYNQUANT_CASE)
#undef DYNQUANT_CASE
  }
  return x;
}

Floats forward(const Forward& args) {
  const int64_t m = args.m, k = args.k, n = args.n;
  Floats x = args.x;
  for (int64_t i = 0; i < m; ++i) rotate_row(x.data() + i * k, k, args.rotation);
  const QParams of_all = args.given != nullptr ? *args.given : qparams_of(range_of(x.data(), m * k));
  std::vector<QParams> qparams(index(m));
  Bytes q(index(m * k));
  for (int64_t i = 0; i < m; ++i) {
    const Range range = range_of(x.data() + i * k, k);
    QParams& row = qparams[index(i)];
    row = args.given != nullptr || args.per_tensor ? of_all : qparams_of(range);
    // Fixed qparams say nothing of this row.
    if (!std::isfinite(range.lo) || !std::isfinite(range.hi)) row = QParams{NAN, 0};
    for (int64_t j = 0; j < k; ++j) q[index(i * k + j)] = quantize_value(x[index(i * k + j)], row);
  }
  const std::vector<int64_t> acc = multiply(q, args.weight, m, n, k);
  const std::vector<int32_t> sums = row_sums(args.weight, n, k);
  Floats out(index(m * n));
  for (int64_t i = 0; i < m; ++i) {
    const QParams row = qparams[index(i)];
    for (int64_t c = 0; c < n; ++c) {
      const int64_t exact = acc[index(i * n + c)] - static_cast<int64_t>(row.zero_point) * sums[index(c)];
      const float product = OneLane::mul(static_cast<float>(exact), args.weight_scale[index(c)]);
      const float y = args.bias.empty() ? OneLane::mul(product, row.scale)
                                        : OneLane::fma(product, row.scale, args.bias[index(c)]);
      out[index(i * n + c)] = epilogue_of(args.epilogue, y);
    }
  }
  return out;
}

}  // namespace kernel_tests
