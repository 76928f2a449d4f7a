// The kernels of one instruction set: each of isa/scalar.cpp, isa/avx2.cpp, ... fills a table with instances
// of the generic bodies.
//
// Shapes are M (rows of x), N (output channels), K (inputs). The packed weight is
// [ceil(N/P)][ceil(K/4)][P][4] int8, P = 64, 32 or 16, zero-padded. Every kernel runs on the calling thread
// alone, within the thread scope of its table.
#pragma once

#include <cstdint>

#include "config.h"
#include "types.h"
#include "cpu/isa/thread_scope.h"

namespace dynquant::cpu {

// Beyond this K an int32 accumulator could wrap (255 * 128 * K): K is split, and partial sums are added in
// int64.
constexpr int64_t kMaxInt32K = 65793;

// Tiles [begin, end) of all `count` tiles of m rows. Every thread derives the same tiles, of at most
// KernelTable::max_rows rows each.
struct RowTiles {
  int64_t m, count, begin, end;
};

// Quantized activations in the layout of the instruction set's dot product: row m at data + m * stride bytes
// (activation_stride()). Where the exact products depend on the values, the plan of tile t, at
// plans + t * plan_stride (plan_bytes()), lists them.
struct PackedActivations {
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
  bool full_range;     // may hold -128
};

// A layer with a float weight.
struct FloatLayer {
  Rows weight;        // [n][k]
  const float* bias;  // [n] or null
};

struct Destination {
  void* data;  // row m at data + m * stride elements
  int64_t stride;
  Dtype dtype;
  Epilogue epilogue;
};

enum class NormKind : int { kNone, kLayer, kRms };

struct Norm {
  NormKind kind;
  const float* weight;  // or null
  const float* bias;    // or null
  float eps;
};

// Attention scales and weighs keys in blocks of this many, which are part of its arithmetic.
constexpr int64_t kKeyBlock = 64;

enum class MaskType : int { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t element_size(MaskType type) {
  return type == MaskType::kBool ? 1 : type == MaskType::kFloat32 ? 4 : 2;
}

// The mask of one head: (i, j) at data + i * query_stride + j * key_stride elements.
struct AttentionMask {
  const void* data;
  MaskType type;
  int64_t query_stride, key_stride;
};

struct AttentionHead {
  Rows q;        // [queries][head_size]
  int64_t keys;  // of k and v, which are packed
  float factor;  // of the products, log2(e) included
  AttentionMask mask;
  bool is_causal;
  Destination out;  // without epilogue
};

enum class RnnCell : int { kLstm, kGru, kTanh, kRelu };

// Its gates: a weight has this many times as many channels as there are hidden units.
constexpr int64_t gates_of(RnnCell cell) {
  return cell == RnnCell::kLstm ? 4 : cell == RnnCell::kGru ? 3 : 1;
}

// A time step of a recurrent layer after its products, for `m` sequences.
struct RnnStep {
  RnnCell cell;
  int64_t m, hidden;
  const float *from_input, *from_hidden;  // [m][gates_of(cell) * hidden]
  float* h;                               // [m][hidden]; GRU: the previous ones, which are replaced
  float* c;                               // LSTM: [m][hidden], replaced
};

enum class BagMode : int { kSum, kMean, kMax };

// Rows of k int8 with a scale each: row r at data + r * row_bytes; for panels > 1 a packed weight of such
// panels.
struct Int8Table {
  const int8_t* data;
  int64_t panel, row_bytes, k;
  const float* scale;
};

// Rows of an int8 table, reduced in bags: bag b has the rows indices[i] for i from offsets[b] to
// offsets[b + 1], the last one to `end`; without offsets it is the one row indices[b].
struct EmbeddingBags {
  Int8Table table;
  const int64_t* indices;  // [count], in range
  int64_t count;
  const int64_t* offsets;  // [bags] or null
  int64_t bags, end;
  const float* weights;   // [count], factors of the scales, or null
  int64_t padding_index;  // of rows that no bag counts; -1 for none
  BagMode mode;
  Destination out;  // [bags][k]; its epilogue is not applied
};

// A table of which output row m takes row indices[m % count]. The indices are in range.
struct IndexedTable {
  Rows rows;  // of floats, if int8.data is null
  Int8Table int8;
  const int64_t* indices;
  int64_t count;
};

// The sum of a row of each table, then a norm.
struct EmbeddingNorm {
  const IndexedTable* tables;
  int64_t table_count;  // > 0
  Norm norm;
  int64_t m, k;
  Destination out;  // [m][k]; its epilogue is not applied
};

// Calls with 2 to kFewRows rows may use a separate kernel table.
constexpr int64_t kFewRows = 7;

struct KernelTable {
  const char* name;
  // Approximate GOPS (multiplications and additions) of one core, from which the number of threads follows.
  double gops;

  const KernelTable* few_rows;  // for calls with 2 to kFewRows rows; null: this table

  const KernelTable* full_range;  // for weights that may hold -128; null: this table

  const ThreadScope* scope;  // to be entered by each thread that calls the kernels below

  int64_t max_rows;  // of a row tile

  int64_t rows_at_once;  // best number of rows to quantize and multiply before the next ones

  // Bytes of one packed row of k activations: an odd multiple of 64, so that rows do not share L1 sets.
  int64_t (*activation_stride)(int64_t k);

  // Bytes of the plan of one row tile of m rows, a multiple of 64; 0 where there is none.
  int64_t (*plan_bytes)(int64_t m, int64_t k);

  // Range of rows [m0, m1), after the rotation. row: scratch of row_floats(k) floats.
  Range (*min_max)(const Rows& x, int64_t m0, int64_t m1, float* row);

  // Rotates row m into out[0..k), fp32.
  void (*rotate)(const Rows& x, int64_t m, float* out);

  // q[k] of row m as int8.
  void (*quantize)(const Rows& x, int64_t m, QParams qparams, int8_t* q, float* row);

  // Quantizes and packs the rows of `tiles`, each with its own qparams, which are written to qparams[m].
  void (*quantize_per_token)(const Rows& x, RowTiles tiles, PackedActivations a, QParams* qparams,
                             float* row);

  // The same with the given qparams. Without check_rows they were chosen for the range of x; with it, for
  // another range, and a row with a non-finite element gets the scale NaN.
  void (*quantize_per_tensor)(const Rows& x, RowTiles tiles, QParams given, bool check_rows,
                              PackedActivations a, QParams* qparams, float* row);

  // Packs the rows of `tiles` of int8 q [.][k].
  void (*pack_int8)(const int8_t* q, int64_t k, RowTiles tiles, PackedActivations a);

  // Bytes of scratch for `rows` of the m rows of a GEMM.
  int64_t (*gemm_scratch)(int64_t m, int64_t k, int64_t rows);

  // out[m, n] = epilogue(fma(float(acc - zero_point[m] * sum[n]) * weight.scale[n], scale[m], bias[n]))
  // for the rows of `tiles` and the channels of the 64-channel blocks [block0, block1).
  void (*linear)(PackedActivations a, const QParams* qparams, const Weight& w, const Destination& out,
                 int8_t* scratch, RowTiles tiles, int64_t block0, int64_t block1);

  // out[m, n] = acc, int32 [.][n].
  void (*int8_mm)(PackedActivations a, const Weight& w, int32_t* out, int8_t* scratch, RowTiles tiles,
                  int64_t block0, int64_t block1);

  // Floats of scratch of linear_fp32 for m rows.
  int64_t (*linear_fp32_scratch)(int64_t m, int64_t k);

  // out[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n] in fp32 [.][n], each one chain of fma in the
  // order of k from the bias on, for the 64-channel blocks [block0, block1). A row of x with a non-finite
  // element gives NaN.
  void (*linear_fp32)(const Rows& x, const FloatLayer& layer, float* out, float* scratch, int64_t block0,
                      int64_t block1);

  // out = norm(y + residual) for m rows of n elements. sum: the rows y + residual, n apart, which may be y;
  // null without a residual. The output's epilogue is not applied.
  void (*add_norm)(const float* y, int64_t stride, const Rows* residual, float* sum, const Norm& norm,
                   int64_t m, int64_t n, const Destination& out);

  // y[i] *= by[i]
  void (*multiply)(float* y, const float* by, int64_t count);

  // The gate functions, for hidden units [unit0, unit1).
  void (*rnn_step)(const RnnStep& step, int64_t unit0, int64_t unit1);

  // Largest |w| of row m, after rotation and its factor 1/block; +inf or NaN if an element is non-finite.
  float (*weight_range)(const Rows& w, int64_t m, float* row);

  // clamp(round(w / scale), -127, 127) of row m.
  void (*quantize_weight)(const Rows& w, int64_t m, float scale, int8_t* q, float* row);

  // Bytes of a packed block of keys and values, a multiple of 64.
  int64_t (*key_block_bytes)(int64_t head_size);

  // Packs block b, keys [64 b, 64 b + 64) of k and v [keys][head_size].
  void (*pack_keys)(const Rows& k, const Rows& v, int64_t b, uint8_t* packed);

  // Bytes of scratch of attend, a multiple of 64.
  int64_t (*attention_scratch)(int64_t head_size, int64_t blocks);

  // Queries [begin, end) of a head, whose packed blocks lie one behind the other.
  void (*attend)(const AttentionHead& head, int64_t begin, int64_t end, const uint8_t* packed,
                 uint8_t* scratch);

  // Bags [first, last).
  void (*embedding_bags)(const EmbeddingBags& args, int64_t first, int64_t last);

  // Rows [first, last). sums: scratch of embedding_rows_at_once rows of k floats.
  void (*embedding_norm)(const EmbeddingNorm& args, int64_t first, int64_t last, float* sums);
  int64_t embedding_rows_at_once;
};

// Threads share out the channels of a GEMM in blocks of this many.
constexpr int64_t kBlock = 64;

// Floats of scratch for a kernel's `row` argument; only rotation uses it.
constexpr int64_t row_floats(int64_t k) { return (k + 63) / 64 * 64; }

// The qparams of a range, as reference.choose_qparams; in quantize.cpp.
QParams choose_qparams(Range range);

}  // namespace dynquant::cpu
