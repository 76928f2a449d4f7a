#include "cpu/quantize.h"

#include <algorithm>
#include <cmath>

#include "cpu/isa/dispatch.h"
#include "cpu/partition.h"

namespace dynquant::cpu {
namespace {

// Calls task(m) for each row m of x, on as many threads as the work justifies.
template <typename Task>
void for_each_row(const KernelTable& table, const Rows& x, const Parallel& parallel, const Task& task) {
  const int64_t threads = threads_over_rows(x, parallel);
  parallel.run(*table.scope, threads, [&](int64_t t) {
    const auto [m0, m1] = share(x.m, threads, t);
    for (int64_t i = m0; i < m1; ++i) task(i);
  });
}

}  // namespace

// ---- rows of x ----

void min_max_rows(const Rows& x, float* lo, float* hi, const Parallel& parallel) {
  const KernelTable& table = kernels();
  for_each_row(table, x, parallel, [&](int64_t i) {
    const Range range = table.min_max(x, i, i + 1, nullptr);
    lo[i] = range.lo;
    hi[i] = range.hi;
  });
}

RowsPlan plan_min_max(const Rows& x, int64_t least_threads, const Parallel& parallel) {
  const int64_t threads = std::max(least_threads, threads_over_rows(x, parallel));
  return {threads, piece_bytes<float>(threads * row_scratch(x)) + piece_bytes<Range>(threads)};
}

Range min_max(const Rows& x, const RowsPlan& plan, void* workspace, const Parallel& parallel) {
  const KernelTable& table = kernels();
  const int64_t threads = plan.threads, row = row_scratch(x);
  float* rows = static_cast<float*>(workspace);
  Range* ranges =
      reinterpret_cast<Range*>(static_cast<uint8_t*>(workspace) + piece_bytes<float>(threads * row));
  parallel.run(*table.scope, threads, [&](int64_t t) {
    const auto [m0, m1] = share(x.m, threads, t);
    ranges[t] = table.min_max(x, m0, m1, rows + t * row);
  });
  Range all = ranges[0];
  for (int64_t t = 1; t < threads; ++t) {
    const Range r = ranges[t];
    if (std::isnan(r.lo) || std::isnan(all.lo)) return Range{std::nanf(""), std::nanf("")};
    all = Range{std::min(all.lo, r.lo), std::max(all.hi, r.hi)};
  }
  return all;
}

QParams choose_qparams(Range range) {
  if (!std::isfinite(range.lo) || !std::isfinite(range.hi)) return QParams{std::nanf(""), 0};
  const float width = range.hi / 255.0f - range.lo / 255.0f;
  const float scale = width < 0x1p-126f ? 0x1p-126f : width;
  const float inv_scale = 1.0f / scale;
  // To nearest even; one instruction on x86.
  const long zero_point = std::lrint(-128.0f - range.lo * inv_scale);
  return QParams{scale, static_cast<int32_t>(std::clamp(zero_point, -128l, 127l))};
}

void choose_qparams(const float* lo, const float* hi, int64_t count, float* scale, int32_t* zero_point) {
  const InThreadScope scope(kFloatModes);
  for (int64_t i = 0; i < count; ++i) {
    const QParams q = choose_qparams(Range{lo[i], hi[i]});
    scale[i] = q.scale;
    zero_point[i] = q.zero_point;
  }
}

void quantize(const Rows& x, const float* scale, const int32_t* zero_point, bool per_row, int8_t* q,
              const Parallel& parallel) {
  const KernelTable& table = kernels();
  for_each_row(table, x, parallel, [&](int64_t i) {
    const int64_t at = per_row ? i : 0;
    table.quantize(x, i, QParams{scale[at], zero_point[at]}, q + i * x.k, nullptr);
  });
}

void rotate(const Rows& x, float* out, const Parallel& parallel) {
  const KernelTable& table = kernels();
  for_each_row(table, x, parallel, [&](int64_t i) { table.rotate(x, i, out + i * x.k); });
}

void read_row(const Rows& x, int64_t m, float* out) {
  Rows plain = x;
  plain.rotation = {1, false};  // the identity: converts any dtype to fp32
  const KernelTable& table = kernels();
  const InThreadScope scope(*table.scope);
  table.rotate(plain, m, out);
}

// ---- rows of a weight ----

RowsPlan plan_quantize_weight(const QuantizeWeight& args, const Parallel& parallel) {
  const int64_t threads = threads_over_rows(args.weight, parallel);
  return {threads,
          piece_bytes<float>(args.weight.m) + piece_bytes<float>(threads * row_scratch(args.weight))};
}

int64_t quantize_weight(const QuantizeWeight& args, const RowsPlan& plan, void* workspace,
                        const Parallel& parallel) {
  const KernelTable& table = kernels();
  const Rows& weight = args.weight;
  const int64_t n = weight.m, threads = plan.threads, row = row_scratch(weight);
  float* largest = static_cast<float*>(workspace);  // |w| of each row
  float* rows = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + piece_bytes<float>(n));
  const auto scale_of = [](float magnitude) {
    return magnitude == 0.0f ? 1.0f : std::max(magnitude / 127.0f, 0x1p-126f);
  };
  parallel.run(*table.scope, threads, [&](int64_t t) {
    const auto [n0, n1] = share(n, threads, t);
    for (int64_t i = n0; i < n1; ++i) {
      largest[i] = table.weight_range(weight, i, rows + t * row);
      if (args.per_tensor || !std::isfinite(largest[i])) continue;
      args.scale[i] = scale_of(largest[i]);
      table.quantize_weight(weight, i, args.scale[i], args.q + i * weight.k, rows + t * row);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(largest[i])) return i;
  }
  if (args.per_tensor) {
    float magnitude = 0.0f;
    for (int64_t i = 0; i < n; ++i) magnitude = std::max(magnitude, largest[i]);
    *args.scale = scale_of(magnitude);
    parallel.run(*table.scope, threads, [&](int64_t t) {
      const auto [n0, n1] = share(n, threads, t);
      for (int64_t i = n0; i < n1; ++i) {
        table.quantize_weight(weight, i, *args.scale, args.q + i * weight.k, rows + t * row);
      }
    });
  }
  return -1;
}

}  // namespace dynquant::cpu
