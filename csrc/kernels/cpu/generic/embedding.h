// Rows of an int8 table, dequantized, and sums, means and maxima of bags of them, as
// dynquant/reference/embedding.py defines them. Included by generic/kernels.h.

// Vectors of a bag that stay in registers while its rows pass.
constexpr int kBagVectors = 8;

// Rows to fetch ahead of the one in use: rows are at random addresses, where no hardware prefetcher helps.
constexpr int64_t kRowsAhead = 8;

// The int8 of row `index` from column `at` on, in order: where they are, or, of a packed weight, in `buffer`.
DYNQUANT_INLINE const int8_t* row_values(const EmbeddingBags& args, int64_t index, int64_t at, int64_t count,
                                         int8_t* buffer) {
  if (args.panel == 1 && count % W == 0) return args.table + index * args.row_bytes + at;
  if (args.panel == 1) {
    __builtin_memcpy(buffer, args.table + index * args.row_bytes + at, count);
    return buffer;
  }
  const int64_t panel = index / args.panel, channel = index % args.panel;
  const int8_t* from = args.table + panel * args.panel * args.row_bytes + channel * 4 + at * args.panel;
  for (int64_t i = 0; i < count; i += 4) __builtin_memcpy(buffer + i, from + i * args.panel, 4);
  return buffer;
}

DYNQUANT_INLINE void fetch_row(const EmbeddingBags& args, int64_t index) {
  if (args.panel != 1) return;
  const int8_t* row = args.table + index * args.row_bytes;
  for (int64_t at = 0; at < args.k; at += 64) __builtin_prefetch(row + at);
}

// Columns [at, at + count) of one bag, positions [begin, end) of args.indices.
template <int kVectors, typename T>
void reduce_columns(const EmbeddingBags& args, int64_t begin, int64_t end, int64_t at, int64_t count,
                    T* out) {
  const bool is_max = args.mode == BagMode::kMax;
  F total[kVectors];
  DYNQUANT_UNROLL
  for (int j = 0; j < kVectors; ++j) total[j] = V::broadcast(is_max ? -__builtin_inff() : 0.0f);
  int64_t rows = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = args.indices[i];
    if (at == 0 && i + kRowsAhead < args.count) fetch_row(args, args.indices[i + kRowsAhead]);
    if (index == args.padding_index) continue;
    ++rows;
    int8_t buffer[kVectors * W] = {};
    const int8_t* q = row_values(args, index, at, count, buffer);
    float scale = args.scale[index];
    if (args.weights != nullptr) scale = scale * args.weights[i];
    const F of_row = V::broadcast(scale);
    DYNQUANT_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const F value = V::mul(V::convert(V::load_bytes(q + j * W)), of_row);
      total[j] = is_max ? V::max(total[j], value) : V::add(total[j], value);
    }
  }
  const F divisor = V::broadcast(static_cast<float>(rows));
  DYNQUANT_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    F value = rows == 0 ? V::broadcast(0.0f) : total[j];
    if (args.mode == BagMode::kMean && rows > 0) value = V::div(value, divisor);
    store_up_to(out + at + j * W, value, least(W, count - j * W));
  }
}

// All columns from `at` on: kVectors vectors at a time, then half as many.
template <int kVectors, typename T>
void reduce_from(const EmbeddingBags& args, int64_t begin, int64_t end, int64_t at, T* out) {
  for (; at + kVectors * W <= args.k; at += kVectors * W) {
    reduce_columns<kVectors>(args, begin, end, at, kVectors * W, out);
  }
  if constexpr (kVectors > 1) {
    reduce_from<kVectors / 2>(args, begin, end, at, out);
  } else if (at < args.k) {
    reduce_columns<1>(args, begin, end, at, args.k - at, out);
  }
}

void embedding_bags(const EmbeddingBags& args, int64_t first, int64_t last) {
  for (int64_t bag = first; bag < last; ++bag) {
    const int64_t begin = args.offsets == nullptr ? bag : args.offsets[bag];
    const int64_t end = args.offsets == nullptr ? bag + 1
                        : bag + 1 < args.bags   ? args.offsets[bag + 1]
                                                : args.end;
    with_output_row(args.out, bag, [&](auto* out) { reduce_from<kBagVectors>(args, begin, end, 0, out); });
  }
}
