// Rotation, range and quantization of rows of x and of a weight. Included by generic/kernels.h.

// ---- rows of x ----

// The sign bits of the factors of kCount elements from the start of a block on.
template <int kBlockSize, int kCount>
struct RotationSigns {
  alignas(64) int32_t bits[kCount];

  constexpr explicit RotationSigns(bool signs) : bits{} {
    for (uint32_t i = 0; i < kCount; ++i) {
      bits[i] = signs ? static_cast<int32_t>(rotation_sign(i % kBlockSize)) : 0;
    }
  }
};

// Rotates blocks of kVectors * W elements, all stages in registers: strides below W inside each, then across
// them. signs: the sign bits of kVectors * W elements.
template <int kVectors, int kStages, typename T>
void rotate_blocks(const T* x, int64_t k, const int32_t* signs, float* out) {
  int64_t i = 0;
  for (; i + kVectors * W <= k; i += kVectors * W) {
    F v[kVectors];
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      v[j] = V::as_float(V::bit_xor(V::as_int(V::load(x + i + j * W)), V::load(signs + j * W)));
      if constexpr (kStages >= 1) v[j] = V::butterfly<1>(v[j]);
      if constexpr (kStages >= 2) v[j] = V::butterfly<2>(v[j]);
      if constexpr (kStages >= 3 && W >= 8) v[j] = V::template butterfly<4>(v[j]);
      if constexpr (kStages >= 4 && W >= 16) v[j] = V::template butterfly<8>(v[j]);
    }
    DYNQUANT_UNROLL
    for (int stride = 1; stride < kVectors; stride *= 2) {
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        if (j & stride) continue;
        const F a = v[j], b = v[j + stride];
        v[j] = V::add(a, b);
        v[j + stride] = V::sub(a, b);
      }
    }
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) V::store(out + i + j * W, v[j]);
  }
  if (i < k) {  // only blocks smaller than a vector leave a rest: whole blocks
    T rest[kVectors * W] = {};
    __builtin_memcpy(rest, x + i, (k - i) * sizeof(T));
    float rotated[kVectors * W];
    rotate_blocks<kVectors, kStages>(rest, kVectors * W, signs, rotated);
    __builtin_memcpy(out + i, rotated, (k - i) * sizeof(float));
  }
}

template <int kBlockSize, typename T>
void rotate_span_by(const T* x, int64_t k, bool signs, float* out) {
  constexpr int kStages = __builtin_ctz(kBlockSize), kVectors = kBlockSize > W ? kBlockSize / W : 1;
  static constexpr RotationSigns<kBlockSize, kVectors * W> kNone(false), kSigns(true);
  rotate_blocks<kVectors, kStages>(x, k, (signs ? kSigns : kNone).bits, out);
}

template <typename T>
void rotate_span(const T* x, int64_t k, Rotation rotation, float* out) {
  switch (rotation.block) {
    case 2: return rotate_span_by<2>(x, k, rotation.signs, out);
    case 4: return rotate_span_by<4>(x, k, rotation.signs, out);
    case 8: return rotate_span_by<8>(x, k, rotation.signs, out);
    case 16: return rotate_span_by<16>(x, k, rotation.signs, out);
    case 32: return rotate_span_by<32>(x, k, rotation.signs, out);
    case 64: return rotate_span_by<64>(x, k, rotation.signs, out);
    case 128: return rotate_span_by<128>(x, k, rotation.signs, out);
    default: return rotate_span_by<1>(x, k, rotation.signs, out);
  }
}

// Calls body(pointer to row m): in x's dtype, or in fp32, rotated into the scratch row.
template <typename Body>
void with_row(const Rows& x, int64_t m, float* row, Body body) {
  const int64_t at = m * x.stride;
  const auto typed = [&](const auto* data) {
    if (x.rotation.block > 0) {
      rotate_span(data + at, x.k, x.rotation, row);
      body(static_cast<const float*>(row));
    } else {
      body(data + at);
    }
  };
  switch (x.dtype) {
    case Dtype::kFloat32: return typed(static_cast<const float*>(x.data));
    case Dtype::kBFloat16: return typed(static_cast<const BFloat16*>(x.data));
    case Dtype::kFloat16: return typed(static_cast<const Float16*>(x.data));
    case Dtype::kInt32: return;  // never the dtype of x
  }
}

void rotate(const Rows& x, int64_t m, float* out) {
  with_row(x, m, out, [](const auto*) {});
}

// ---- range ----

Range merge(Range a, Range b) {
  if (a.lo != a.lo || b.lo != b.lo) return Range{__builtin_nanf(""), __builtin_nanf("")};
  return Range{b.lo < a.lo ? b.lo : a.lo, b.hi > a.hi ? b.hi : a.hi};
}

// In bytes. A large x comes from L3 or memory, and the hardware prefetcher stops at the end of a page.
constexpr int64_t kFetchAhead = 2048;

// minps and maxps drop a NaN, so a comparison of two vectors at a time detects NaNs.
template <typename T>
Range span_range(const T* x, int64_t k) {
  constexpr int kChains = 4;  // min and max take four cycles on some CPUs
  F lo[kChains], hi[kChains];
  for (int j = 0; j < kChains; ++j) lo[j] = hi[j] = V::broadcast(0.0f);
  typename V::Mask nan = V::unordered(lo[0], lo[0]);
  int64_t i = 0;
  for (; i + kChains * W <= k; i += kChains * W) {
    for (int j = 0; j < kChains * W; j += 64 / static_cast<int>(sizeof(T))) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + j) + kFetchAhead, 0, 3);
    }
    F v[kChains];
    DYNQUANT_UNROLL
    for (int j = 0; j < kChains; ++j) {
      v[j] = V::in_register(V::load(x + i + j * W));
      lo[j] = V::min(lo[j], v[j]);
      hi[j] = V::max(hi[j], v[j]);
      if (j % 2 == 1) nan = V::either(nan, V::unordered(v[j - 1], v[j]));
    }
  }
  for (; i < k; i += W) {
    const F v = load_up_to(x + i, k - i);
    lo[0] = V::min(lo[0], v);
    hi[0] = V::max(hi[0], v);
    nan = V::either(nan, V::unordered(v, v));
  }
  if (V::any(nan)) return Range{__builtin_nanf(""), __builtin_nanf("")};
  const F lows = V::min(V::min(lo[0], lo[1]), V::min(lo[2], lo[3]));
  const F highs = V::max(V::max(hi[0], hi[1]), V::max(hi[2], hi[3]));
  return Range{V::lowest_lane(lows) + 0.0f, V::highest_lane(highs) + 0.0f};  // no -0.0
}

Range min_max(const Rows& x, int64_t m0, int64_t m1, float* row) {
  Range range{0.0f, 0.0f};
  for (int64_t m = m0; m < m1; ++m) {
    with_row(x, m, row, [&](const auto* data) { range = merge(range, span_range(data, x.k)); });
  }
  return range;
}

// ---- quantize ----

// Guarantees about the numbers to quantize.
enum class Values {
  kInRange,  // of the range for which the qparams were chosen: only rounding leaves [-128, 127]
  kFinite,
  kAny,
};

// round(x / scale) + zero_point, which the caller saturates to [-128, 127]. Values out of range are clamped
// first: a large float would not fit the int of round, and integer bounds leave the result as it is.
struct Quantizer {
  F inv_scale, low, high, nan;
  I zero_point;

  explicit Quantizer(QParams q)
      : inv_scale(V::broadcast(1.0f / q.scale)),
        low(V::broadcast(-128.0f - static_cast<float>(q.zero_point))),
        high(V::broadcast(127.0f - static_cast<float>(q.zero_point))),
        nan(V::broadcast(-static_cast<float>(q.zero_point))),
        zero_point(V::broadcast(q.zero_point)) {}

  template <Values kValues>
  I quantize(F x) const {
    const F exact = V::mul(x, inv_scale);
    F steps = exact;
    if constexpr (kValues != Values::kInRange) steps = V::min(V::max(steps, low), high);
    if constexpr (kValues == Values::kAny) steps = V::select(V::unordered(exact, exact), nan, steps);
    return V::add(V::round(steps), zero_point);
  }
};

// Quantizes chunk by chunk. put(i, q0, q1, q2, q3) saturates and stores elements [i, i + kChunk); beyond k
// they are quantized zeros.
template <Values kValues, typename T, typename Put>
void quantize_chunks(const T* x, int64_t k, QParams qparams, Put put) {
  const Quantizer quantizer(qparams);
  int64_t i = 0;
  const auto chunk = [&](const T* p) {
    put(i, quantizer.template quantize<kValues>(V::load(p)),
        quantizer.template quantize<kValues>(V::load(p + W)),
        quantizer.template quantize<kValues>(V::load(p + 2 * W)),
        quantizer.template quantize<kValues>(V::load(p + 3 * W)));
  };
  for (; i + kChunk <= k; i += kChunk) chunk(x + i);
  if (i < k) {
    T rest[kChunk] = {};
    __builtin_memcpy(rest, x + i, (k - i) * sizeof(T));
    chunk(rest);
  }
}

// Stores int8 in order, exactly k elements.
struct PutInt8 {
  int8_t* q;
  int64_t k;

  void operator()(int64_t i, I q0, I q1, I q2, I q3) const {
    if (i + kChunk <= k) return V::store_bytes(q + i, q0, q1, q2, q3);
    int8_t rest[kChunk];
    V::store_bytes(rest, q0, q1, q2, q3);
    __builtin_memcpy(q + i, rest, k - i);
  }
};

// Stores packed activations, whose rows have room for whole chunks.
struct PutActivations {
  uint8_t* row;

  void operator()(int64_t i, I q0, I q1, I q2, I q3) const {
    Dot::store_activations(row + i / 4 * Dot::kGroupBytes, q0, q1, q2, q3);
  }
};

int64_t activation_stride(int64_t k) {
  const int64_t lines = (round_up(k, kChunk) / 4 * Dot::kGroupBytes + 63) / 64;
  return (lines | 1) * 64;
}

void zero_activation_row(uint8_t* row, int64_t k) {
  const I zero = V::broadcast(0);
  for (int64_t i = 0; i < k; i += kChunk) PutActivations{row}(i, zero, zero, zero, zero);
}

void quantize(const Rows& x, int64_t m, QParams qparams, int8_t* q, float* row) {
  if (qparams.scale != qparams.scale) {
    for (int64_t i = 0; i < x.k; ++i) q[i] = 0;
    return;
  }
  with_row(x, m, row,
           [&](const auto* data) { quantize_chunks<Values::kAny>(data, x.k, qparams, PutInt8{q, x.k}); });
}

template <Values kValues, typename T>
void quantize_activation_row(const T* data, int64_t k, QParams qparams, uint8_t* row) {
  if (qparams.scale != qparams.scale) return zero_activation_row(row, k);
  quantize_chunks<kValues>(data, k, qparams, PutActivations{row});
}

// ---- row tiles ----

// D = Dot is a template parameter, so that `if constexpr` discards branches this ISA lacks.
template <typename D = Dot>
int64_t plan_bytes(int64_t m, int64_t k) {
  if constexpr (D::kPlans) return m > kFewRows && 0 < k && k <= kMaxInt32K ? D::plan_bytes(k) : 0;
  return 0;
}

// Tiles have nearly equal heights: the first `taller` tiles have one row more than the others.
struct TileRows {
  int64_t height, taller;

  explicit TileRows(RowTiles tiles)
      : height(tiles.count > 0 ? tiles.m / tiles.count : 0), taller(tiles.m - height * tiles.count) {}

  int64_t first(int64_t t) const { return t * height + least(t, taller); }
};

template <typename D = Dot>
typename D::Plan& plan_of(PackedActivations a, int64_t t) {
  return *reinterpret_cast<typename D::Plan*>(a.plans + t * a.plan_stride);
}

// Has put(m) fill the packed rows tile by tile, and makes the plan of a tile while its rows are in L1.
template <typename Put, typename D = Dot>
void fill_activations(PackedActivations a, int64_t k, RowTiles tiles, const Put& put) {
  const TileRows tile_rows(tiles);
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t m0 = tile_rows.first(t), m1 = tile_rows.first(t + 1);
    for (int64_t m = m0; m < m1; ++m) put(m);
    if constexpr (D::kPlans) {
      if (a.plan_stride > 0) {
        D::make_plan(a.data + m0 * a.stride, a.stride, static_cast<int>(m1 - m0), k, plan_of<D>(a, t));
      }
    }
  }
}

void quantize_per_token(const Rows& x, RowTiles tiles, PackedActivations a, QParams* qparams, float* row) {
  if (x.rotation.block > 0) {
    return fill_activations(a, x.k, tiles, [&](int64_t m) {
      with_row(x, m, row, [&](const auto* data) {
        qparams[m] = choose_qparams(span_range(data, x.k));
        quantize_activation_row<Values::kInRange>(data, x.k, qparams[m], a.data + m * a.stride);
      });
    });
  }
  // The range of the next row is found before a row is quantized, which hides the latency of the divisions
  // for qparams.
  const int64_t end = TileRows(tiles).first(tiles.end);
  Range next{0.0f, 0.0f};
  const auto find_range = [&](int64_t m) {
    if (m < end) with_row(x, m, row, [&](const auto* data) { next = span_range(data, x.k); });
  };
  find_range(TileRows(tiles).first(tiles.begin));
  fill_activations(a, x.k, tiles, [&](int64_t m) {
    qparams[m] = choose_qparams(next);
    find_range(m + 1);
    with_row(x, m, row, [&](const auto* data) {
      quantize_activation_row<Values::kInRange>(data, x.k, qparams[m], a.data + m * a.stride);
    });
  });
}

void quantize_per_tensor(const Rows& x, RowTiles tiles, QParams given, bool check_rows, PackedActivations a,
                         QParams* qparams, float* row) {
  fill_activations(a, x.k, tiles, [&](int64_t m) {
    with_row(x, m, row, [&](const auto* data) {
      qparams[m] = given;
      if (check_rows) {
        const Range range = span_range(data, x.k);
        const bool finite = range.lo - range.lo == 0.0f && range.hi - range.hi == 0.0f;
        if (!finite) qparams[m] = QParams{__builtin_nanf(""), 0};
      }
      uint8_t* to = a.data + m * a.stride;
      check_rows ? quantize_activation_row<Values::kFinite>(data, x.k, qparams[m], to)
                 : quantize_activation_row<Values::kInRange>(data, x.k, qparams[m], to);
    });
  });
}

void pack_int8(const int8_t* q, int64_t k, RowTiles tiles, PackedActivations a) {
  fill_activations(a, k, tiles, [&](int64_t m) {
    const PutActivations put{a.data + m * a.stride};
    for (int64_t i = 0; i < k; i += kChunk) {
      int8_t chunk[kChunk] = {};
      __builtin_memcpy(chunk, q + m * k + i, least(kChunk, k - i));
      put(i, V::load_bytes(chunk), V::load_bytes(chunk + W), V::load_bytes(chunk + 2 * W),
          V::load_bytes(chunk + 3 * W));
    }
  });
}

// ---- weights ----

// Activations take the bare sums of the transform, weights these times 1/block, a power of two.
void scale_rotated(float* row, const Rows& w) {
  const F share = V::broadcast(1.0f / static_cast<float>(w.rotation.block));
  for (int64_t i = 0; i < w.k; i += W) {
    store_up_to(row + i, V::mul(load_up_to(row + i, w.k - i), share), w.k - i);
  }
}

float weight_range(const Rows& w, int64_t m, float* row) {
  I magnitude = V::broadcast(0);
  with_row(w, m, row, [&](const auto* data) {
    if (w.rotation.block > 0) scale_rotated(row, w);
    for (int64_t i = 0; i < w.k; i += W) {
      const F x = load_up_to(data + i, w.k - i);
      magnitude = V::max(magnitude, V::bit_and(V::as_int(x), V::broadcast(0x7fffffff)));
    }
  });
  int32_t lanes[W], bits = 0;
  V::store(lanes, magnitude);
  for (const int32_t lane : lanes) bits = lane > bits ? lane : bits;
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof(largest));
  return largest;
}

void quantize_weight(const Rows& w, int64_t m, float scale, int8_t* q, float* row) {
  const F divisor = V::broadcast(scale), low = V::broadcast(-127.0f), high = V::broadcast(127.0f);
  const auto steps = [&](F x) { return V::round(V::min(V::max(V::div(x, divisor), low), high)); };
  with_row(w, m, row, [&](const auto* data) {
    if (w.rotation.block > 0) scale_rotated(row, w);
    const PutInt8 put{q, w.k};
    for (int64_t i = 0; i < w.k; i += kChunk) {
      const auto part = [&](int64_t at) { return steps(load_up_to(data + at, w.k - at)); };
      put(i, part(i), part(i + W), part(i + 2 * W), part(i + 3 * W));
    }
  });
}
