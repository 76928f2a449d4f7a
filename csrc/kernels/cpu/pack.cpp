#include "cpu/pack.h"

#include <algorithm>
#include <cstring>

#include "cpu/partition.h"

namespace dynquant::cpu {

int64_t panel_width(int64_t n) {
  for (const int64_t panel : {64, 32}) {
    if ((n + panel - 1) / panel * panel - n < 16) return panel;
  }
  return 16;
}

std::array<int64_t, 4> packed_shape(int64_t n, int64_t k) {
  const int64_t panel = panel_width(n);
  return {divide_up(n, panel), divide_up(k, 4), panel, 4};
}

int64_t find_minus_128(const int8_t* weight, int64_t count) {
  int8_t lowest = 0;
  for (int64_t i = 0; i < count; ++i) lowest = std::min(lowest, weight[i]);
  return lowest > -128 ? -1 : std::find(weight, weight + count, static_cast<int8_t>(-128)) - weight;
}

namespace {

// Groups of a row to move together: one cache line, so that each line is fetched once.
constexpr int64_t kGroupsAtOnce = 16;

// Calls move(packed group, plain group, bytes) for all groups of panels [panel0, panel1).
template <typename Packed, typename Plain, typename Move>
void for_each_group(Packed* packed, Plain* weight, int64_t n, int64_t k, int64_t panel, int64_t panel0,
                    int64_t panel1, const Move& move) {
  const int64_t groups = (k + 3) / 4, whole = k / 4;
  for (int64_t p = panel0; p < panel1; ++p) {
    Packed* to = packed + p * groups * panel * 4;
    const int64_t channels = std::min(panel, n - p * panel);
    for (int64_t g0 = 0; g0 < whole; g0 += kGroupsAtOnce) {
      const int64_t g1 = std::min(g0 + kGroupsAtOnce, whole);
      for (int64_t c = 0; c < channels; ++c) {
        Plain* row = weight + (p * panel + c) * k;
        for (int64_t g = g0; g < g1; ++g) move(to + (g * panel + c) * 4, row + g * 4, 4);
      }
    }
    if (whole == groups) continue;
    for (int64_t c = 0; c < channels; ++c) {
      move(to + (whole * panel + c) * 4, weight + (p * panel + c) * k + whole * 4, k % 4);
    }
  }
}

// Panels [panel0, panel1) from weight [n][k], and the sums of their rows.
void pack_panels(const int8_t* weight, int64_t n, int64_t k, int64_t panel, int64_t panel0, int64_t panel1,
                 int8_t* packed, int32_t* sum) {
  const int64_t panel_bytes = (k + 3) / 4 * panel * 4;
  const bool padded = n % panel != 0 || k % 4 != 0;
  if (padded && panel0 < panel1) {
    std::memset(packed + panel0 * panel_bytes, 0, static_cast<size_t>((panel1 - panel0) * panel_bytes));
  }
  for_each_group(packed, weight, n, k, panel, panel0, panel1,
                 [](int8_t* to, const int8_t* from, size_t bytes) { std::memcpy(to, from, bytes); });
  for (int64_t c = panel0 * panel; c < std::min(panel1 * panel, n); ++c) {
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += weight[c * k + i];
    sum[c] = total;
  }
}

void unpack_panels(const int8_t* packed, int64_t n, int64_t k, int64_t panel, int64_t panel0, int64_t panel1,
                   int8_t* weight) {
  for_each_group(packed, weight, n, k, panel, panel0, panel1,
                 [](const int8_t* from, int8_t* to, size_t bytes) { std::memcpy(to, from, bytes); });
}

// Calls task(panel0, panel1) for shares of all panels, on as many threads as the work justifies.
template <typename Task>
void for_shares_of_panels(int64_t n, int64_t k, int64_t panels, const Parallel& parallel, const Task& task) {
  constexpr double kBytesPerMicrosecond = 2e3;  // of one core
  const double microseconds = static_cast<double>(n) * static_cast<double>(k) / kBytesPerMicrosecond;
  const int64_t threads = std::min(std::max<int64_t>(1, panels), threads_for(microseconds, parallel));
  parallel.run(kFloatModes, threads, [&](int64_t t) {
    const auto [p0, p1] = share(panels, threads, t);
    task(p0, p1);
  });
}

}  // namespace

void pack_weight(const int8_t* weight, int64_t n, int64_t k, int8_t* packed, int32_t* sum,
                 const Parallel& parallel) {
  const int64_t panel = panel_width(n);
  for_shares_of_panels(n, k, divide_up(n, panel), parallel, [&](int64_t p0, int64_t p1) {
    pack_panels(weight, n, k, panel, p0, p1, packed, sum);
  });
}

void unpack_weight(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, const Parallel& parallel) {
  const int64_t panel = panel_width(n);
  for_shares_of_panels(n, k, divide_up(n, panel), parallel,
                       [&](int64_t p0, int64_t p1) { unpack_panels(packed, n, k, panel, p0, p1, weight); });
}

}  // namespace dynquant::cpu
