#include "cpu/pack.h"

#include <algorithm>
#include <cstring>

namespace dynquant::cpu {

int64_t panel_width(int64_t n) {
  for (const int64_t panel : {64, 32}) {
    if ((n + panel - 1) / panel * panel - n < 16) return panel;
  }
  return 16;
}

namespace {

// Groups of a row that are moved together: a cache line of it, so that each line is fetched once.
constexpr int64_t kGroupsAtOnce = 16;

// Calls move(group in the packed weight, group in the weight, bytes of it) for all groups of [panel0, panel1).
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

}  // namespace

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

}  // namespace dynquant::cpu
