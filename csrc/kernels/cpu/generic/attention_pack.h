// Packed keys and values of attention, and symmetric quantization of rows. Included by generic/attention.h.

// Record of a block: the pieces begin at multiples of 64 bytes.
struct KeyBlock {
  int64_t width;     // channels of v, rounded up to whole vectors
  int8_t* k;         // [ceil(D/4)][64][4]
  int8_t* v;         // [16][width][4]
  float* k_scale;    // [64]
  float* v_scale;    // [width]
  int32_t* k_start;  // [64]: what the offset of packed queries adds to a product, negated
  int32_t* v_start;  // [width]: likewise for probabilities, which are packed as p - 128
  float* extent;     // bound of abs(product * k_scale); NaN if a key is not finite
  int64_t bytes;

  KeyBlock(uint8_t* memory, int64_t head_size) : width(round_up(head_size, W)) {
    uint8_t* at = memory;
    const auto piece = [&](int64_t size) {
      uint8_t* begin = at;
      at += round_up(size, 64);
      return begin;
    };
    k = reinterpret_cast<int8_t*>(piece((head_size + 3) / 4 * kKeyBlock * 4));
    v = reinterpret_cast<int8_t*>(piece(kKeyBlock * width));
    k_scale = reinterpret_cast<float*>(piece(kKeyBlock * 4));
    v_scale = reinterpret_cast<float*>(piece(width * 4));
    k_start = reinterpret_cast<int32_t*>(piece(kKeyBlock * 4));
    v_start = reinterpret_cast<int32_t*>(piece(width * 4));
    extent = reinterpret_cast<float*>(piece(4));
    bytes = at - memory;
  }
};

int64_t key_block_bytes(int64_t head_size) { return KeyBlock(nullptr, head_size).bytes; }

constexpr float kLeastScale = 1.17549435e-38f;  // FLT_MIN: 1 / scale stays finite

DYNQUANT_INLINE F magnitude(F x) { return V::as_float(V::bit_and(V::as_int(x), V::broadcast(0x7fffffff))); }

// scale = max(largest / 127, FLT_MIN), NaN where `largest` is not finite.
DYNQUANT_INLINE F symmetric_scale(F largest) {
  const F scale = V::max(V::div(largest, V::broadcast(127.0f)), V::broadcast(kLeastScale));
  return V::select(V::less(largest, V::broadcast(kInfinity)), scale, V::broadcast(__builtin_nanf("")));
}

// x / scale as an integer in [-127, 127]; any for a scale of NaN, whose reciprocal no integer follows from.
DYNQUANT_INLINE I symmetric_steps(F x, F inverse) {
  // V::max and V::min return the second of their arguments for NaN.
  const F steps = V::max(V::mul(x, inverse), V::broadcast(-127.0f));
  return V::round(V::min(steps, V::broadcast(127.0f)));
}

// Largest magnitude of a row, +inf or NaN bits above it if an element is not finite.
template <typename T>
float row_magnitude(const T* x, int64_t k) {
  I largest = V::broadcast(0);
  for (int64_t i = 0; i < k; i += W) {
    largest = V::max(largest, V::bit_and(V::as_int(load_up_to(x + i, k - i)), V::broadcast(0x7fffffff)));
  }
  return V::highest_lane(V::min(V::as_float(largest), V::broadcast(kInfinity)));
}

// W scales in place of the largest magnitudes, and their reciprocals.
DYNQUANT_INLINE void symmetric_scales(float* scales, float* inverses) {
  const F scale = symmetric_scale(V::load(scales));
  V::store(scales, scale);
  V::store(inverses, V::div(V::broadcast(1.0f), scale));
}

// Calls put(i, q0, q1, q2, q3) for elements [i, i + kChunk); zeros beyond k.
template <typename T, typename Put>
DYNQUANT_INLINE void quantize_symmetric(const T* x, int64_t k, F inverse, const Put& put) {
  for (int64_t i = 0; i < k; i += kChunk) {
    I q[4];
    DYNQUANT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + j * W;
      q[j] = at < k ? symmetric_steps(load_up_to(x + at, k - at), inverse) : V::broadcast(0);
    }
    put(i, q[0], q[1], q[2], q[3]);
  }
}

// A panel of packed k or v as the weights of a GEMM tile.
struct AttentionPanel {
  static constexpr bool kBiased = false;

  DYNQUANT_INLINE I load(const int8_t* group, int j) const {
    return V::load(reinterpret_cast<const int32_t*>(group) + j * W);
  }
};

// The products of kRows packed rows with kVectors vectors of channels.
template <int kRows, int kVectors>
DYNQUANT_INLINE Accumulators<kRows, kVectors> panel_products(const uint8_t* a, int64_t a_stride,
                                                             const int8_t* b, int64_t group_stride,
                                                             int64_t groups, const int32_t* start) {
  Accumulators<kRows, kVectors> acc;
  acc.load(start, 0);
  for (int64_t g = 0; g < groups; ++g) {
    acc.add_group(typename Dot::Exact(), a, a_stride, AttentionPanel(), b);
    a += Dot::kGroupBytes;
    b += group_stride;
  }
  return acc;
}

// factor times the sum of each channel of a panel, for `width` channels.
void channel_sums(const int8_t* panel, int64_t groups, int64_t width, int32_t factor, int32_t* sums) {
  uint8_t ones[Dot::kGroupBytes * W];
  const I one = V::broadcast(1 - Dot::kOffset);
  Dot::store_activations(ones, one, one, one, one);
  for (int64_t c = 0; c < width; c += W) {
    Accumulators<1, 1> acc;
    for (int64_t g = 0; g < groups; ++g) {
      acc.add_group(typename Dot::Exact(), ones, 0, AttentionPanel(), panel + (g * width + c) * 4);
    }
    V::store(sums + c, V::mul(acc.acc[0][0], V::broadcast(factor)));
  }
}

// Four values, [-128, 127] each, as the bytes of a lane.
DYNQUANT_INLINE I pack_lanes(I q0, I q1, I q2, I q3) {
  const I byte = V::broadcast(255);
  const I low = V::bit_or(V::bit_and(q0, byte), V::shift_left<8>(V::bit_and(q1, byte)));
  return V::bit_or(low, V::bit_or(V::shift_left<16>(V::bit_and(q2, byte)), V::shift_left<24>(q3)));
}

// Elements [d, d + W) of W keys, `keys` of which exist, as W vectors of one element of each key.
template <typename T>
DYNQUANT_INLINE void load_transposed(const T* rows, int64_t stride, int64_t keys, int64_t d,
                                     int64_t head_size, F (&columns)[W]) {
  const int64_t present = head_size - d;
  if (keys >= W && present >= W) {
    DYNQUANT_UNROLL
    for (int j = 0; j < W; ++j) columns[j] = V::load(rows + j * stride + d);
  } else {
    for (int j = 0; j < W; ++j) {
      columns[j] = j < keys ? load_up_to(rows + j * stride + d, present) : V::broadcast(0.0f);
    }
  }
  V::transpose(columns);
}

// Asks for rows [first, end). A head has a small part of each row of the model's tensors, and these parts are
// too far apart for a hardware prefetcher.
template <bool kWrite = false, typename T>
DYNQUANT_INLINE void fetch_rows(const T* x, int64_t stride, int64_t head_size, int64_t first, int64_t end) {
  for (int64_t m = first; m < end; ++m) fetch<kWrite>(x + m * stride, head_size);
}

// A lane is a key. Small heads stay in registers or L1 between the search for the maximum and the rounding.
// fetch_ahead(j): called before the keys [j, j + W).
template <typename T, typename Fetch>
void pack_k(const T* rows, int64_t stride, int64_t count, int64_t head_size, const KeyBlock& block,
            const Fetch& fetch_ahead) {
  const int64_t groups = (head_size + 3) / 4;
  F largest_scale = V::broadcast(0.0f);
  typename V::Mask nan = V::unordered(largest_scale, largest_scale);
  for (int64_t j = 0; j < kKeyBlock; j += W) {
    fetch_ahead(j);
    const T* keys = rows + j * stride;
    int32_t* words = reinterpret_cast<int32_t*>(block.k) + j;
    F columns[W];
    I largest = V::broadcast(0);
    for (int64_t d = 0; d < head_size; d += W) {
      load_transposed(keys, stride, count - j, d, head_size, columns);
      DYNQUANT_UNROLL
      for (int i = 0; i < W; ++i) largest = V::max(largest, V::as_int(magnitude(columns[i])));
    }
    const F scale = symmetric_scale(V::as_float(largest)), inverse = V::div(V::broadcast(1.0f), scale);
    V::store(block.k_scale + j, scale);
    largest_scale = V::max(largest_scale, scale);
    nan = V::either(nan, V::unordered(scale, scale));
    for (int64_t d = 0; d < head_size; d += W) {
      if (head_size > W) load_transposed(keys, stride, count - j, d, head_size, columns);
      DYNQUANT_UNROLL
      for (int i = 0; i < W; i += 4) {
        if (d + i >= head_size) break;
        V::store(
            words + (d + i) / 4 * kKeyBlock,
            pack_lanes(symmetric_steps(columns[i], inverse), symmetric_steps(columns[i + 1], inverse),
                       symmetric_steps(columns[i + 2], inverse), symmetric_steps(columns[i + 3], inverse)));
      }
    }
  }
  *block.extent = V::any(nan)
                      ? __builtin_nanf("")
                      : V::highest_lane(largest_scale) * (127.0f * 127.0f * static_cast<float>(head_size));
  channel_sums(block.k, Dot::kOffset == 0 ? 0 : groups, kKeyBlock, -Dot::kOffset, block.k_start);
}

// W channels of v from channel d on: a lane is a channel.
template <bool kWhole, typename T>
DYNQUANT_INLINE void pack_v_vector(const T* rows, int64_t stride, int64_t count, int64_t channels,
                                   const KeyBlock& block, int64_t d) {
  const auto load = [&](int64_t j) DYNQUANT_INLINE_LAMBDA {
    if constexpr (kWhole) return V::load(rows + j * stride + d);
    return j < count ? load_up_to(rows + j * stride + d, channels) : V::broadcast(0.0f);
  };
  I largest[4];
  for (I& of_part : largest) of_part = V::broadcast(0);
  for (int64_t j = 0; j < kKeyBlock; j += 4) {
    DYNQUANT_UNROLL
    for (int i = 0; i < 4; ++i) largest[i] = V::max(largest[i], V::as_int(magnitude(load(j + i))));
  }
  // NaN has bits above those of infinity; symmetric_scale takes neither.
  const F scale =
      symmetric_scale(V::as_float(V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3]))));
  const F inverse = V::div(V::broadcast(1.0f), scale);
  V::store(block.v_scale + d, scale);
  int32_t* words = reinterpret_cast<int32_t*>(block.v) + d;
  for (int64_t j = 0; j < kKeyBlock; j += 4, words += block.width) {
    V::store(words, pack_lanes(symmetric_steps(load(j), inverse), symmetric_steps(load(j + 1), inverse),
                               symmetric_steps(load(j + 2), inverse), symmetric_steps(load(j + 3), inverse)));
  }
}

template <typename T>
void pack_v(const T* rows, int64_t stride, int64_t count, int64_t head_size, const KeyBlock& block) {
  for (int64_t d = 0; d < block.width; d += W) {
    count == kKeyBlock&& d + W <= head_size
        ? pack_v_vector<true>(rows, stride, count, W, block, d)
        : pack_v_vector<false>(rows, stride, count, head_size - d, block, d);
  }
  const int32_t offset = 128 - Dot::kOffset;
  channel_sums(block.v, offset == 0 ? 0 : kKeyBlock / 4, block.width, offset, block.v_start);
}

// Calls body(pointer to the first element) with x's type.
template <typename Body>
DYNQUANT_INLINE void with_type(Dtype dtype, const void* data, Body body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(static_cast<const float*>(data));
    case Dtype::kBFloat16: return body(static_cast<const BFloat16*>(data));
    case Dtype::kFloat16: return body(static_cast<const Float16*>(data));
    case Dtype::kInt32: return;  // never the dtype of x
  }
}

template <typename T>
void pack_block(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t keys, int64_t b,
                const KeyBlock& block, int64_t head_size) {
  const int64_t first = b * kKeyBlock, count = least(kKeyBlock, keys - first);
  pack_k(k + first * k_stride, k_stride, count, head_size, block, [&](int64_t j) DYNQUANT_INLINE_LAMBDA {
    const int64_t at = first + j;
    fetch_rows(v, v_stride, head_size, at, least(at + W, keys));
    fetch_rows(k, k_stride, head_size, at + W, least(at + 2 * W, keys));
  });
  pack_v(v + first * v_stride, v_stride, count, head_size, block);
}

void pack_keys(const Rows& k, const Rows& v, int64_t b, uint8_t* packed) {
  with_type(k.dtype, k.data, [&](const auto* rows) {  // v has the dtype of k
    pack_block(rows, k.stride, static_cast<decltype(rows)>(v.data), v.stride, k.m, b, KeyBlock(packed, k.k),
               k.k);
  });
}
