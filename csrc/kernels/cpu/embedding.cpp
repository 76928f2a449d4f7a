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

void embedding_bags(const EmbeddingBags& args, const Parallel& parallel) {
  // A row costs about as much as its bytes from L3; a packed one a cache line for each 4 of them.
  const double bytes = args.panel == 1 ? static_cast<double>(args.k) : 16.0 * static_cast<double>(args.k);
  constexpr double kBytesPerMicrosecond = 10e3, kRowMicroseconds = 0.01;
  const double per_row = kRowMicroseconds + bytes / kBytesPerMicrosecond;
  const double microseconds = static_cast<double>(args.count) * per_row;
  const int64_t threads = std::max<int64_t>(1, std::min(args.bags, threads_for(microseconds, parallel)));
  const KernelTable& table = kernels();
  parallel.run(*table.scope, threads, [&](int64_t t) {
    const auto [begin, end] = share(args.bags, threads, t);
    table.embedding_bags(args, begin, end);
  });
}

}  // namespace dynquant::cpu
