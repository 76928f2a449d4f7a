#include "pack.h"

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

// Calls move(channel, group, bytes, address of that group of 4 in the packed weight).
template <typename Move>
void for_each_group(int64_t n, int64_t k, int64_t panel, int64_t panel0, int64_t panel1, const Move& move) {
  const int64_t groups = (k + 3) / 4;
  for (int64_t p = panel0; p < panel1; ++p) {
    for (int64_t g0 = 0; g0 < groups; g0 += kGroupsAtOnce) {
      const int64_t g1 = std::min(g0 + kGroupsAtOnce, groups);
      for (int64_t c = 0; c < std::min(panel, n - p * panel); ++c) {
        for (int64_t g = g0; g < g1; ++g) {
          move(p * panel + c, g, std::min<int64_t>(4, k - g * 4), ((p * groups + g) * panel + c) * 4);
        }
      }
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
  for_each_group(n, k, panel, panel0, panel1, [&](int64_t c, int64_t g, int64_t bytes, int64_t at) {
    const int8_t* from = weight + c * k + g * 4;
    bytes == 4 ? std::memcpy(packed + at, from, 4)
               : std::memcpy(packed + at, from, static_cast<size_t>(bytes));
  });
  for (int64_t c = panel0 * panel; c < std::min(panel1 * panel, n); ++c) {
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += weight[c * k + i];
    sum[c] = total;
  }
}

void unpack_panels(const int8_t* packed, int64_t n, int64_t k, int64_t panel, int64_t panel0, int64_t panel1,
                   int8_t* weight) {
  for_each_group(n, k, panel, panel0, panel1, [&](int64_t c, int64_t g, int64_t bytes, int64_t at) {
    int8_t* to = weight + c * k + g * 4;
    bytes == 4 ? std::memcpy(to, packed + at, 4) : std::memcpy(to, packed + at, static_cast<size_t>(bytes));
  });
}

}  // namespace dynquant::cpu
