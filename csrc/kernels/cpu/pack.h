// The packed weight: panels of P output channels, within a panel groups of 4 along K, within a group P x 4
// int8.
//
//   [ceil(N/P)][ceil(K/4)][P][4]      channel c, input k  ->  [c / P][k / 4][c % P][k % 4]
//
// so that one vector load reads the same 4 inputs of neighbouring channels. N and K are padded with zeros.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/parallel.h"

namespace dynquant::cpu {

// P: the widest of 64, 32, 16 that pads N by fewer than 16 rows.
int64_t panel_width(int64_t n);

std::array<int64_t, 4> packed_shape(int64_t n, int64_t k);

// Index of the first -128 of a weight, or -1 if there is none: the AVX2 products negate weights.
int64_t find_minus_128(const int8_t* weight, int64_t count);

// packed: packed_shape(n, k); sum: [n], of each row.
void pack_weight(const int8_t* weight, int64_t n, int64_t k, int8_t* packed, int32_t* sum,
                 const Parallel& parallel);
void unpack_weight(const int8_t* packed, int64_t n, int64_t k, int8_t* weight, const Parallel& parallel);

}  // namespace dynquant::cpu
