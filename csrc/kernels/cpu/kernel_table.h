// What an instruction set brings: one table of kernels, filled by each of scalar.cpp, avx2.cpp, ... from the
// one body in generic/kernels.h. Nothing here knows of torch.
//
// Shapes are M (rows of x), N (output channels), K (inputs). The packed weight is
// [ceil(N/P)][ceil(K/4)][P][4] int8, P = 64, 32 or 16, zero-padded. Every kernel runs on the calling thread
// alone and expects round-to-nearest without flushing of denormals: see FloatEnvironment.
#pragma once

#include <cstdint>

#include "config.h"
#include "types.h"

namespace dynquant::cpu {

// Beyond this K an int32 accumulator could wrap (255 * 127 * K), so K is split and the parts are added in
// int64.
constexpr int64_t kMaxInt32K = 66311;

// Tiles [begin, end) of the `count` that the m rows of an operand are cut into, in the same way whoever works on them: at
// most KernelTable::max_rows rows each.
struct RowTiles {
  int64_t m, count, begin, end;
};

// Where the activations of a GEMM lie after quantization: row m at data + m * stride bytes (operand_stride()), in the
// form that the instruction set's dot product wants, and the plan of tile t at plans + t * plan_stride (plan_bytes()):
// which products are exact for it, where that depends on the values.
struct Operand {
  uint8_t* data;
  int64_t stride;
  uint8_t* plans;
  int64_t plan_stride;
};

struct Weight {
  const int8_t* packed;
  int64_t n, k, panel;
  const int32_t* sum;  // [n]
  const float* scale;  // [n]
  const float* bias;   // [n] or null
};

struct Output {
  void* data;  // row m at data + m * stride elements
  int64_t stride;
  Dtype dtype;
  Epilogue epilogue;
};

// Up to so many rows, but for one alone, may have kernels of their own.
constexpr int64_t kFewRows = 7;

struct KernelTable {
  const char* name;
  // GOPS (multiplications and additions) that one core reaches, in round numbers: how many threads a call is
  // worth.
  double gops;

  const KernelTable* few_rows;  // the kernels of calls of 2 to kFewRows rows; null: these

  int64_t max_rows;  // of a row tile

  int64_t rows_at_once;  // so many are best quantized and multiplied before the next

  // Bytes of one operand row of k elements, a multiple of 64 that is odd in units of 64 (rows must not share
  // L1 sets).
  int64_t (*operand_stride)(int64_t k);

  // Bytes of the plan of one row tile of m rows, a multiple of 64; 0 where there is none.
  int64_t (*plan_bytes)(int64_t m, int64_t k);

  // Range of rows [m0, m1), after the rotation. row: scratch of rotated_row_floats(k) floats (see below).
  Range (*min_max)(const Rows& x, int64_t m0, int64_t m1, float* row);

  // Rotates row m into out[0..k), fp32.
  void (*rotate)(const Rows& x, int64_t m, float* out);

  // q[k] of row m as int8.
  void (*quantize)(const Rows& x, int64_t m, QParams qparams, int8_t* q, float* row);

  // Rows of `tiles` to the operand with qparams of their own, which go to qparams[m].
  void (*quantize_per_token)(const Rows& x, RowTiles tiles, Operand a, QParams* qparams, float* row);

  // The same with the given qparams: chosen for the range of x, or for another, where check_rows is set; then a row
  // with a non-finite element gets the scale NaN.
  void (*quantize_per_tensor)(const Rows& x, RowTiles tiles, QParams given, bool check_rows, Operand a,
                              QParams* qparams, float* row);

  // Rows of `tiles` of int8 q [.][k] to the operand.
  void (*operand_from_int8)(const int8_t* q, int64_t k, RowTiles tiles, Operand a);

  // Bytes of scratch that a GEMM wants for `rows` of its m rows.
  int64_t (*gemm_scratch)(int64_t m, int64_t k, int64_t rows);

  // out[m, n] = epilogue((float(acc - zero_point[m] * sum[n]) * scale[m]) * weight.scale[n] + bias[n])
  // for the rows of `tiles` and the channels of the 64-channel blocks [block0, block1).
  void (*linear)(Operand a, const QParams* qparams, const Weight& w, const Output& out, int8_t* scratch,
                 RowTiles tiles, int64_t block0, int64_t block1);

  // out[m, n] = acc, int32 [.][n].
  void (*int8_mm)(Operand a, const Weight& w, int32_t* out, int8_t* scratch, RowTiles tiles, int64_t block0,
                  int64_t block1);

  // Largest |w| of row m; +inf or NaN (as bits above +inf) where one is non-finite. Scaled by 1/block when
  // rotated.
  float (*weight_range)(const Rows& w, int64_t m, float* row);

  // clamp(round(w / scale), -127, 127) of row m.
  void (*quantize_weight)(const Rows& w, int64_t m, float scale, int8_t* q, float* row);
};

// Channels that a thread's share of a GEMM is counted in.
constexpr int64_t kBlock = 64;

// Floats of the scratch row that kernels with a `row` argument write to (unused without rotation).
constexpr int64_t row_floats(int64_t k) { return (k + 63) / 64 * 64; }

// qparams of a range, as reference.choose_qparams; quantize.cpp.
QParams choose_qparams(Range range);

}  // namespace dynquant::cpu
