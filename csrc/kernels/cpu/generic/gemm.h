// The GEMM: the order of its tiles. Included by generic/kernels.h.

#include "cpu/generic/gemm_tile.h"
#include "cpu/generic/gemm_output.h"
#include "cpu/generic/gemm_packed.h"
#include "cpu/generic/gemm_repacked.h"
#include "cpu/generic/gemm_k_blocked.h"

template <typename D = Dot>
int64_t gemm_scratch(int64_t m, int64_t k, int64_t rows) {
  if constexpr (D::kPlans)
    return m > kFewRows ? RepackedBody<LinearOutput, D, false>::scratch_bytes(rows) : 0;
  return is_k_blocked(m, k) ? rows * kBlock * 4 : 0;
}

// Whether the products of the first tile take w + 128; most other tiles then do too.
template <typename D = Dot>
bool takes_biased(PackedActivations a, RowTiles tiles) {
  if constexpr (D::kPlans) return tiles.begin < tiles.end && D::takes_biased(plan_of<D>(a, tiles.begin));
  return false;
}

// A tile's weights stay in L1, or in L2 if K is large, for all row tiles.
template <typename Output>
void gemm(const Output& output, int8_t* scratch, RowTiles tiles, int64_t block0, int64_t block1) {
  const int64_t end = least(block1 * kBlock, output.w.n);
  const bool repacks = output.a.plan_stride > 0 && output.w.panel == kBlock;
  const bool biased = repacks && takes_biased(output.a, tiles);
  const bool k_blocked = is_k_blocked(tiles.m, output.w.k) && output.w.panel == kBlock;
  const int64_t width = repacks || k_blocked ? kBlock : tiles.m == 1 ? Dot::kVectors<1> * W : kWidth;
  for (int64_t c = block0 * kBlock; c < end; c += width) {
    if (repacks) {
      biased ? gemm_repacked<true>(output, scratch, tiles, c)
             : gemm_repacked<false>(output, scratch, tiles, c);
    } else if (k_blocked) {
      gemm_k_blocked(output, scratch, tiles, c);
    } else {
      for_row_tiles(tiles, PackedBody<Output>{output, tiles, c, least(c + width, end)});
    }
  }
}

void linear(PackedActivations a, const QParams* qparams, const Weight& w, const Destination& out,
            int8_t* scratch, RowTiles tiles, int64_t block0, int64_t block1) {
  gemm(LinearOutput{a, qparams, w, out}, scratch, tiles, block0, block1);
}

void int8_mm(PackedActivations a, const Weight& w, int32_t* out, int8_t* scratch, RowTiles tiles,
             int64_t block0, int64_t block1) {
  gemm(Int8MmOutput{a, w, out}, scratch, tiles, block0, block1);
}
