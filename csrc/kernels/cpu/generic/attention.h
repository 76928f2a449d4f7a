// Attention of rows of one head with packed keys and values. Included by generic/kernels.h.
//
// A tile of up to Dot::kMaxRows queries visits the blocks of 64 keys in order:
//
//   q [rows][D] x k [D/4][64][4]   ->  products int32 [rows][64]   a GEMM tile; all of it in L1
//   softmax                        ->  p, packed activations [rows][64], maximum and total of each row
//   p x v [16][width][4]           ->  float [block][rows][width]  a GEMM tile
//
// No step needs the maximum of the whole row: it comes in at the end, when the blocks are added up.

#include "cpu/generic/attention_pack.h"

// ---- masks ----

enum class Seen { kNone, kAll, kBiased };

// bias[j] = mask * log2(e) for float masks, 0 or -inf for bool ones; -inf from `visible` on.
template <typename T>
Seen bias_of_floats(const T* mask, int64_t visible, float* bias) {
  const F masked = V::broadcast(-0x1p126f), none = V::broadcast(-kInfinity), zero = V::broadcast(0.0f);
  typename V::Mask seen = V::less(zero, zero), added_to = seen;
  for (int64_t j = 0; j < kKeyBlock; j += W) {
    const F added = load_up_to(mask + j, visible - j);
    const F scaled = V::mul(added, V::broadcast(1.44269502f));
    const auto counts = V::either(V::less(masked, added), V::unordered(added, added));
    seen = V::either(seen, counts);
    added_to = V::either(added_to, V::either(V::either(V::less(added, zero), V::less(zero, added)),
                                             V::unordered(added, added)));
    V::store(bias + j, V::select(counts, scaled, none));
  }
  for (int64_t j = visible; j < kKeyBlock; ++j) bias[j] = -kInfinity;
  if (!V::any(seen)) return Seen::kNone;
  return visible < kKeyBlock || V::any(added_to) ? Seen::kBiased : Seen::kAll;
}

Seen bias_of_bools(const uint8_t* mask, int64_t visible, float* bias) {
  int64_t seen = 0;
  for (int64_t j = 0; j < visible; ++j) seen += mask[j] != 0;
  if (seen == 0) return Seen::kNone;
  if (seen == kKeyBlock) return Seen::kAll;
  for (int64_t j = 0; j < kKeyBlock; ++j) bias[j] = j < visible && mask[j] != 0 ? 0.0f : -kInfinity;
  return Seen::kBiased;
}

// The keys [first, first + 64) that query i sees, of which `visible` exist and precede it.
template <typename T>
Seen bias_of_mask(const AttentionMask& mask, int64_t i, int64_t first, int64_t visible, float* bias) {
  const T* at = static_cast<const T*>(mask.data) + i * mask.query_stride + first * mask.key_stride;
  T gathered[kKeyBlock];
  if (mask.key_stride != 1) {
    for (int64_t j = 0; j < visible; ++j) gathered[j] = at[j * mask.key_stride];
    at = gathered;
  }
  if constexpr (sizeof(T) == 1) {
    return bias_of_bools(at, visible, bias);
  } else {
    return bias_of_floats(at, visible, bias);
  }
}

Seen bias_of_row(const AttentionHead& head, int64_t i, int64_t first, float* bias) {
  int64_t visible = least(kKeyBlock, head.keys - first);
  if (head.is_causal) visible = least(visible, i + 1 - first);
  if (visible <= 0) return Seen::kNone;
  switch (head.mask.type) {
    case MaskType::kNone: break;
    case MaskType::kBool: return bias_of_mask<uint8_t>(head.mask, i, first, visible, bias);
    case MaskType::kFloat32: return bias_of_mask<float>(head.mask, i, first, visible, bias);
    case MaskType::kBFloat16: return bias_of_mask<BFloat16>(head.mask, i, first, visible, bias);
    case MaskType::kFloat16: return bias_of_mask<Float16>(head.mask, i, first, visible, bias);
  }
  if (visible == kKeyBlock) return Seen::kAll;
  for (int64_t j = 0; j < kKeyBlock; ++j) bias[j] = j < visible ? 0.0f : -kInfinity;
  return Seen::kBiased;
}

// ---- a tile of queries ----

// Memory of a tile; the pieces begin at multiples of 64 bytes.
struct AttentionScratch {
  static constexpr int kRows = Dot::kMaxRows, kLanes = (kRows + W - 1) / W * W;
  static constexpr int64_t kProbabilityStride = kKeyBlock / 4 * Dot::kGroupBytes;

  int64_t q_stride;
  uint8_t* q;         // [rows], packed
  uint8_t* p;         // [rows], packed
  int32_t* products;  // [rows][64]
  float* bias;        // [rows][64]
  float* maxima;      // [blocks][rows, rounded up to vectors]
  float* totals;      // likewise
  float* outputs;     // [blocks][rows][width]
  int64_t bytes;

  AttentionScratch(uint8_t* memory, int64_t head_size, int64_t key_blocks)
      : q_stride(activation_stride(head_size)) {
    uint8_t* at = memory;
    const auto piece = [&](int64_t size) {
      uint8_t* begin = at;
      at += round_up(size, 64);
      return begin;
    };
    q = piece(kRows * q_stride);
    p = piece(kRows * kProbabilityStride);
    products = reinterpret_cast<int32_t*>(piece(kRows * kKeyBlock * 4));
    bias = reinterpret_cast<float*>(piece(kRows * kKeyBlock * 4));
    maxima = reinterpret_cast<float*>(piece(key_blocks * kLanes * 4));
    totals = reinterpret_cast<float*>(piece(key_blocks * kLanes * 4));
    outputs = reinterpret_cast<float*>(piece(key_blocks * kRows * round_up(head_size, W) * 4));
    bytes = at - memory;
  }
};

int64_t attention_scratch(int64_t head_size, int64_t key_blocks) {
  return AttentionScratch(nullptr, head_size, key_blocks).bytes;
}

// body.run<kVectors>(c) for tiles of vectors that cover [0, width).
template <int kVectors, typename Body>
DYNQUANT_INLINE void for_vector_tiles(int64_t width, int64_t c, const Body& body) {
  for (; c + kVectors * W <= width; c += kVectors * W) body.template run<kVectors>(c);
  if constexpr (kVectors > 1) for_vector_tiles<kVectors / 2>(width, c, body);
}

template <int kRows>
struct AttentionTile {
  const AttentionHead& head;
  const AttentionScratch& scratch;
  int64_t row;           // the first query
  float factors[kRows];  // of scores: scale of q, softmax scale, log2(e)

  template <typename T>
  void quantize_queries(const T* q) {
    constexpr int kScales = (kRows + W - 1) / W * W;
    float scales[kScales] = {}, inverses[kScales];
    q += row * head.q.stride;
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) scales[i] = row_magnitude(q + i * head.q.stride, head.q.k);
    for (int i = 0; i < kRows; i += W) symmetric_scales(scales + i, inverses + i);
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      quantize_symmetric(q + i * head.q.stride, head.q.k, V::broadcast(inverses[i]),
                         PutActivations{scratch.q + i * scratch.q_stride});
      factors[i] = scales[i] * head.factor;
    }
  }

  struct Scores {
    const AttentionTile& tile;
    const KeyBlock& block;

    template <int kVectors>
    DYNQUANT_INLINE void run(int64_t c) const {
      panel_products<kRows, kVectors>(tile.scratch.q, tile.scratch.q_stride, block.k + c * 4, kKeyBlock * 4,
                                      (tile.head.q.k + 3) / 4, block.k_start + c)
          .store(tile.scratch.products + c, kKeyBlock);
    }
  };

  struct Outputs {
    const AttentionTile& tile;
    const KeyBlock& block;
    int64_t groups;
    float* out;

    template <int kVectors>
    DYNQUANT_INLINE void run(int64_t c) const {
      const auto acc =
          panel_products<kRows, kVectors>(tile.scratch.p, AttentionScratch::kProbabilityStride,
                                          block.v + c * 4, block.width * 4, groups, block.v_start + c);
      DYNQUANT_UNROLL
      for (int i = 0; i < kRows; ++i) {
        DYNQUANT_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          V::store(out + i * block.width + c + j * W, V::convert(acc.acc[i][j]));
        }
      }
    }
  };

  void attend(const KeyBlock& block, int64_t b) const {
    Seen seen[kRows], seen_by_first = Seen::kNone;
    const float* biases[kRows];
    bool any = false;
    // One row of a padding mask is for all queries.
    const bool is_shared = !head.is_causal && head.mask.query_stride == 0;
    for (int i = 0; i < kRows; ++i) {
      float* bias = scratch.bias + i * kKeyBlock;
      if (i == 0 || !is_shared) {
        seen[i] = bias_of_row(head, row + i, b * kKeyBlock, bias);
        biases[i] = bias;
        if (i == 0) seen_by_first = seen[0];
      } else {
        seen[i] = seen_by_first;
        biases[i] = scratch.bias;
      }
      // Scores that may not be finite are checked, as those with a bias are.
      const float bound = factors[i] * *block.extent;
      if (seen[i] == Seen::kAll && !(-0x1p120f < bound && bound < 0x1p120f)) {
        seen[i] = Seen::kBiased;
        for (int64_t j = 0; j < kKeyBlock; ++j) bias[j] = 0.0f;
        biases[i] = bias;
      }
      any = any || seen[i] != Seen::kNone;
    }
    if (any) for_vector_tiles<tile_vectors()>(kKeyBlock, 0, Scores{*this, block});
    float* maxima = scratch.maxima + b * AttentionScratch::kLanes;
    float* totals = scratch.totals + b * AttentionScratch::kLanes;
    if (!any) {
      for (int i = 0; i < kRows; ++i) maxima[i] = -kInfinity;
      return;
    }
    for (int i = 0; i < kRows; ++i) {
      const int32_t* products = scratch.products + i * kKeyBlock;
      uint8_t* p = scratch.p + i * AttentionScratch::kProbabilityStride;
      if (seen[i] == Seen::kAll) {
        softmax_of_block<false>(products, block.k_scale, factors[i], nullptr, p, maxima + i, totals + i);
      } else if (seen[i] == Seen::kBiased) {
        softmax_of_block<true>(products, block.k_scale, factors[i], biases[i], p, maxima + i, totals + i);
      } else {
        maxima[i] = -kInfinity;
        totals[i] = 0.0f;
        store_no_probabilities(p);
      }
    }
    const int64_t groups = (least(kKeyBlock, head.keys - b * kKeyBlock) + 3) / 4;
    for_vector_tiles<tile_vectors()>(
        block.width, 0, Outputs{*this, block, groups, scratch.outputs + b * kRows * block.width});
  }

  // The weight of each block for each row, -1 where no key takes part, in place of its maximum. The sums of
  // weighted totals: NaN for a row of NaN, 1 for a row without keys, whose output is 0 / 1.
  void weigh_blocks(int64_t blocks, float* denominators) const {
    constexpr int kLanes = AttentionScratch::kLanes;
    const F none = V::broadcast(-kInfinity);
    for (int i = 0; i < kRows; i += W) {
      F highest = none, denominator = V::broadcast(0.0f);
      typename V::Mask nan = V::unordered(none, none);
      for (int64_t b = 0; b < blocks; ++b) {
        const F maximum = V::load(scratch.maxima + b * kLanes + i);
        highest = V::max(highest, maximum);
        nan = V::either(nan, V::unordered(maximum, maximum));
      }
      for (int64_t b = 0; b < blocks; ++b) {
        float* at = scratch.maxima + b * kLanes + i;
        const F maximum = V::load(at), weight = exp2(V::sub(maximum, highest));
        const auto seen = V::less(none, maximum);
        const F sum = V::fma(weight, V::load(scratch.totals + b * kLanes + i), denominator);
        denominator = V::select(seen, sum, denominator);
        V::store(at, V::select(seen, weight, V::broadcast(-1.0f)));
      }
      denominator = V::select(V::less(none, highest), denominator, V::broadcast(1.0f));
      V::store(denominators + i, V::select(nan, V::broadcast(__builtin_nanf("")), denominator));
    }
  }

  template <typename T>
  struct Sum {
    const AttentionTile& tile;
    int64_t row, blocks, stride, width;
    const uint8_t* v_scales;  // of block 0
    F denominator;
    T* out;

    template <int kVectors>
    DYNQUANT_INLINE void run(int64_t d) const {
      F numerators[kVectors];
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) numerators[j] = V::broadcast(0.0f);
      const float* weights = tile.scratch.maxima + row;
      const float* product = tile.scratch.outputs + row * width + d;
      const uint8_t* scales = v_scales + d * 4;
      for (int64_t b = 0; b < blocks; ++b, product += kRows * width, scales += stride) {
        const float of_block = weights[b * AttentionScratch::kLanes];
        if (of_block < 0.0f) continue;
        const F weight = V::broadcast(of_block);
        DYNQUANT_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          const F scale = V::mul(weight, V::load(reinterpret_cast<const float*>(scales) + j * W));
          numerators[j] = V::fma(scale, V::load(product + j * W), numerators[j]);
        }
      }
      DYNQUANT_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = d + j * W;
        store_up_to(out + at, V::div(numerators[j], denominator), tile.head.q.k - at);
      }
    }
  };

  // Adds up the blocks of each row.
  template <typename T>
  void combine(int64_t blocks, const uint8_t* packed, int64_t stride, T* out) const {
    const int64_t width = round_up(head.q.k, W);
    float denominators[AttentionScratch::kLanes];
    weigh_blocks(blocks, denominators);
    const auto* scales =
        reinterpret_cast<const uint8_t*>(KeyBlock(const_cast<uint8_t*>(packed), head.q.k).v_scale);
    for (int i = 0; i < kRows; ++i) {
      const F denominator = V::broadcast(denominators[i]);
      T* to = out + (row + i) * head.out.stride;
      for_vector_tiles<4>(width, 0, Sum<T>{*this, i, blocks, stride, width, scales, denominator, to});
    }
  }

  template <typename T>
  static T* writable(const T* p) {
    return const_cast<T*>(p);
  }

  static constexpr int tile_vectors() {
    return Dot::template kVectors<kRows> < kKeyBlock / W ? Dot::template kVectors<kRows> : kKeyBlock / W;
  }

  void run(const uint8_t* packed, int64_t stride) {
    with_type(head.out.dtype, head.out.data,
              [&](const auto* out) { fetch_rows<true>(out, head.out.stride, head.q.k, row, row + kRows); });
    with_type(head.q.dtype, head.q.data, [&](const auto* q) {
      quantize_queries(q);
      fetch_rows(q, head.q.stride, head.q.k, row + kRows, least(row + 2 * kRows, head.q.m));
    });
    int64_t blocks = (head.keys + kKeyBlock - 1) / kKeyBlock;
    if (head.is_causal) blocks = least(blocks, (row + kRows - 1) / kKeyBlock + 1);
    for (int64_t b = 0; b < blocks; ++b) {
      attend(KeyBlock(const_cast<uint8_t*>(packed) + b * stride, head.q.k), b);
    }
    with_type(head.out.dtype, head.out.data,
              [&](const auto* out) { combine(blocks, packed, stride, writable(out)); });
  }
};

struct AttentionBody {
  const AttentionHead& head;
  const AttentionScratch& scratch;
  int64_t first, stride;
  const uint8_t* packed;

  template <int kRows>
  void call(int64_t, int64_t m) const {
    AttentionTile<kRows>{head, scratch, first + m, {}}.run(packed, stride);
  }
};

void attend(const AttentionHead& head, int64_t begin, int64_t end, const uint8_t* packed, uint8_t* memory) {
  const int64_t head_size = head.q.k, rows = end - begin, tiles = (rows + Dot::kMaxRows - 1) / Dot::kMaxRows;
  const AttentionScratch scratch(memory, head_size, (head.keys + kKeyBlock - 1) / kKeyBlock);
  for_row_tiles(RowTiles{rows, tiles, 0, tiles},
                AttentionBody{head, scratch, begin, key_block_bytes(head_size), packed});
}
