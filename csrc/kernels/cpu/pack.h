// The packed weight: panels of P output channels, within a panel groups of 4 along K, within a group P x 4
// int8.
//
//   [ceil(N/P)][ceil(K/4)][P][4]      channel c, input k  ->  [c / P][k / 4][c % P][k % 4]
//
// so that one vector load brings the same 4 inputs of neighbouring channels. N and K are padded with zeros.
#pragma once

#include <cstdint>

namespace dynquant::cpu {

// P: the widest of 64, 32, 16 that pads N by fewer than 16 rows.
int64_t panel_width(int64_t n);

// Panels [panel0, panel1) from weight [n][k], and the sums of their rows.
void pack_panels(const int8_t* weight, int64_t n, int64_t k, int64_t panel, int64_t panel0, int64_t panel1,
                 int8_t* packed, int32_t* sum);

void unpack_panels(const int8_t* packed, int64_t n, int64_t k, int64_t panel, int64_t panel0, int64_t panel1,
                   int8_t* weight);

}  // namespace dynquant::cpu
