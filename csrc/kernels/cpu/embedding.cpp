#include "cpu/embedding.h"

#include <algorithm>

#include "cpu/isa/dispatch.h"
#include "cpu/partition.h"

namespace dynquant::cpu {

int64_t find_out_of_range(const int64_t* indices, int64_t count, int64_t n) {
  // As unsigned numbers negative indices are large: one comparison, without a branch in the common case.
  uint64_t highest = 0;
  for (int64_t i = 0; i < count; ++i) highest = std::max(highest, static_cast<uint64_t>(indices[i]));
  if (count == 0 || highest < static_cast<uint64_t>(n)) return -1;
  const auto is_outside = [n](int64_t index) { return index < 0 || index >= n; };
  return std::find_if(indices, indices + count, is_outside) - indices;
}

namespace {

constexpr double kRowMicroseconds = 0.01;

// A row costs about as much as its bytes from L3; a packed one a cache line for each 4 of them.
double microseconds_per_row(const Int8Table& table) {
  const double bytes = static_cast<double>(table.k) * (table.panel == 1 ? 1 : 16);
  constexpr double kBytesPerMicrosecond = 10e3;
  return kRowMicroseconds + bytes / kBytesPerMicrosecond;
}

}  // namespace

void embedding_bags(const EmbeddingBags& args, const Parallel& parallel) {
  const double microseconds = static_cast<double>(args.count) * microseconds_per_row(args.table);
  const int64_t threads = std::max<int64_t>(1, std::min(args.bags, threads_for(microseconds, parallel)));
  const KernelTable& table = kernels();
  parallel.run(*table.scope, threads, [&](int64_t t) {
    const auto [begin, end] = share(args.bags, threads, t);
    table.embedding_bags(args, begin, end);
  });
}

EmbeddingNormPlan plan_embedding_norm(const EmbeddingNorm& args, const Parallel& parallel) {
  double per_row = kRowMicroseconds;
  for (int64_t t = 0; t < args.table_count; ++t) {
    const IndexedTable& table = args.tables[t];
    // Rows of floats as four bytes an element: fewer are converted.
    const Int8Table as_bytes{nullptr, 1, 0, 4 * args.k, nullptr};
    per_row += microseconds_per_row(table.int8.data == nullptr ? as_bytes : table.int8);
  }
  EmbeddingNormPlan plan{};
  const int64_t most = threads_for(per_row * static_cast<double>(args.m), parallel);
  plan.threads = std::max<int64_t>(1, std::min(args.m, most));
  plan.sums_bytes = piece_bytes<float>(kernels().embedding_rows_at_once * args.k);
  plan.workspace_bytes = plan.threads * plan.sums_bytes;
  return plan;
}

void embedding_norm(const EmbeddingNorm& args, const EmbeddingNormPlan& plan, void* workspace,
                    const Parallel& parallel) {
  const KernelTable& table = kernels();
  parallel.run(*table.scope, plan.threads, [&](int64_t t) {
    const auto [begin, end] = share(args.m, plan.threads, t);
    uint8_t* sums = static_cast<uint8_t*>(workspace) + t * plan.sums_bytes;
    table.embedding_norm(args, begin, end, reinterpret_cast<float*>(sums));
  });
}

}  // namespace dynquant::cpu
