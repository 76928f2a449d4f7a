// The GEMM: which way a matrix is gone over. A part of generic/kernels.h, over its V and Dot.

#include "cpu/generic/gemm_tile.h"
#include "cpu/generic/gemm_output.h"
#include "cpu/generic/gemm_packed.h"
#include "cpu/generic/gemm_repacked.h"
#include "cpu/generic/gemm_k_blocked.h"

template <typename D = Dot>
int64_t gemm_scratch(int64_t m, int64_t k, int64_t rows) {
  if constexpr (D::kPlans) return m > kFewRows ? GatheredBody<LinearSink, D, false>::scratch_bytes(rows) : 0;
  return takes_parts(m, k) ? rows * kBlock * 4 : 0;
}

// Whether the first tile's products take w + 128: most of the others' do then.
template <typename D = Dot>
bool takes_flipped(Operand a, RowTiles tiles) {
  if constexpr (D::kPlans) return tiles.begin < tiles.end && D::takes_flipped(plan_of<D>(a, tiles.begin));
  return false;
}

// A tile's weights stay in L1, or in L2 where K is large, while all rows go by.
template <typename Sink>
void gemm(const Sink& sink, int8_t* scratch, RowTiles tiles, int64_t block0, int64_t block1) {
  const int64_t end = least(block1 * kBlock, sink.w.n);
  const bool gathers = sink.a.plan_stride > 0 && sink.w.panel == kBlock;
  const bool flips = gathers && takes_flipped(sink.a, tiles);
  const bool parts = takes_parts(tiles.m, sink.w.k) && sink.w.panel == kBlock;
  const int64_t width = gathers || parts ? kBlock : tiles.m == 1 ? Dot::kVectors<1> * W : kWidth;
  for (int64_t c = block0 * kBlock; c < end; c += width) {
    if (gathers) {
      flips ? gemm_gathered<true>(sink, scratch, tiles, c) : gemm_gathered<false>(sink, scratch, tiles, c);
    } else if (parts) {
      gemm_parts(sink, scratch, tiles, c);
    } else {
      for_row_tiles(tiles, PackedBody<Sink>{sink, tiles, c, least(c + width, end)});
    }
  }
}

void linear(Operand a, const QParams* qparams, const Weight& w, const Output& out, int8_t* scratch,
            RowTiles tiles, int64_t block0, int64_t block1) {
  gemm(LinearSink{a, qparams, w, out}, scratch, tiles, block0, block1);
}

void int8_mm(Operand a, const Weight& w, int32_t* out, int8_t* scratch, RowTiles tiles, int64_t block0,
             int64_t block1) {
  gemm(Int8MmSink{a, w, out}, scratch, tiles, block0, block1);
}
