// Rows of an int8 table, dequantized; sums, means and maxima of bags of them; sums of rows of several tables
// with a norm: as dynquant/reference/embedding.py and embedding_norm.py define them. Included by
// generic/kernels.h.

// Vectors of a bag that stay in registers while its rows pass.
constexpr int kBagVectors = 8;

// Rows to fetch ahead of the one in use: rows are at random addresses, where no hardware prefetcher helps.
constexpr int64_t kRowsAhead = 8;

// The int8 of row `index` from column `at` on, in order: where they are, or, of a packed weight, in `buffer`.
DYNQUANT_INLINE const int8_t* row_values(const Int8Table& table, int64_t index, int64_t at, int64_t count,
                                         int8_t* buffer) {
  if (table.panel == 1 && count % W == 0) return table.data + index * table.row_bytes + at;
  if (table.panel == 1) {
    __builtin_memcpy(buffer, table.data + index * table.row_bytes + at, count);
    return buffer;
  }
  const int64_t panel = index / table.panel, channel = index % table.panel;
  const int8_t* from = table.data + panel * table.panel * table.row_bytes + channel * 4 + at * table.panel;
  for (int64_t i = 0; i < count; i += 4) __builtin_memcpy(buffer + i, from + i * table.panel, 4);
  return buffer;
}

DYNQUANT_INLINE void fetch_row(const Int8Table& table, int64_t index) {
  if (table.panel == 1) return fetch(table.data + index * table.row_bytes, table.k);
  const int8_t* row = table.data + index / table.panel * table.panel * table.row_bytes;
  const int64_t step = table.panel < 16 ? 64 / table.panel : 4;  // elements to a cache line
  for (int64_t i = 0; i < table.k; i += step)
    __builtin_prefetch(row + index % table.panel * 4 + i * table.panel);
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
    // The many lines of a packed row come at once only if asked for: the bytes between are put together in
    // memory, whose loads wait for the stores.
    const int64_t ahead = args.table.panel == 1 ? kRowsAhead : 0;
    if (at == 0 && i + ahead < args.count) fetch_row(args.table, args.indices[i + ahead]);
    if (index == args.padding_index) continue;
    ++rows;
    int8_t buffer[kVectors * W] = {};
    const int8_t* q = row_values(args.table, index, at, count, buffer);
    float scale = args.table.scale[index];
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
  for (; at + kVectors * W <= args.table.k; at += kVectors * W) {
    reduce_columns<kVectors>(args, begin, end, at, kVectors * W, out);
  }
  if constexpr (kVectors > 1) {
    reduce_from<kVectors / 2>(args, begin, end, at, out);
  } else if (at < args.table.k) {
    reduce_columns<1>(args, begin, end, at, args.table.k - at, out);
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

// ---- sums of rows of several tables ----

// sum = row, or with kAdd sum + row, for k elements. The elements [at, at + count) of row: load(at, count).
template <bool kAdd, typename Load>
DYNQUANT_INLINE void add_row(float* sum, int64_t k, const Load& load) {
  for (int64_t at = 0; at < k; at += W) {
    const int64_t count = least(W, k - at);
    F value = load(at, count);
    if constexpr (kAdd) value = V::add(load_up_to(sum + at, count), value);
    store_up_to(sum + at, value, count);
  }
}

template <bool kAdd>
void add_table_row(const IndexedTable& table, int64_t index, int64_t k, float* sum) {
  if (table.int8.data == nullptr) {
    with_row(table.rows, index, nullptr, [&](const auto* row) {
      add_row<kAdd>(sum, k, [&](int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
        return load_up_to(row + at, count);
      });
    });
    return;
  }
  const F scale = V::broadcast(table.int8.scale[index]);
  add_row<kAdd>(sum, k, [&](int64_t at, int64_t count) DYNQUANT_INLINE_LAMBDA {
    int8_t buffer[W] = {};
    const int8_t* q = row_values(table.int8, index, at, count, buffer);
    return V::mul(V::convert(V::load_bytes(q)), scale);
  });
}

DYNQUANT_INLINE void fetch_row(const IndexedTable& table, int64_t m) {
  const int64_t index = table.indices[m % table.count];
  if (table.int8.data != nullptr) return fetch_row(table.int8, index);
  with_row(table.rows, index, nullptr, [&](const auto* row) { fetch(row, table.rows.k); });
}

void embedding_norm(const EmbeddingNorm& args, int64_t first, int64_t last, float* sums) {
  for (int64_t m = first; m < last; m += kNormRows) {
    const int64_t rows = least(kNormRows, last - m), ahead = m + kNormRows;
    for (int64_t t = 0; t < args.table_count; ++t) {
      const IndexedTable& table = args.tables[t];
      for (int64_t i = 0; i < rows; ++i) {
        if (ahead + i < last) fetch_row(table, ahead + i);
        const int64_t index = table.indices[(m + i) % table.count];
        float* sum = sums + i * args.k;
        t == 0 ? add_table_row<false>(table, index, args.k, sum)
               : add_table_row<true>(table, index, args.k, sum);
      }
    }
    Destination out = args.out;
    with_output_row(args.out, m, [&](auto* row) { out.data = row; });
    add_norm(sums, args.k, nullptr, nullptr, args.norm, rows, args.k, out);
  }
}
