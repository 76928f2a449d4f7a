// Products with a packed weight, over threads: partition, workspace and schedule.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace dynquant::cpu {

// A GEMM is split along its rows first (each thread quantizes its own), along its channels if rows are too
// few.
struct Partition {
  int64_t row_parts, channel_parts;

  int64_t tasks() const { return row_parts * channel_parts; }
};

// ---- out[m, n] = sum over k of q[m, k] * weight[n, k], int32 ----

struct Int8Mm {
  const int8_t* q;  // [m, weight.k]
  int64_t m;        // > 0, as is weight.n
  Weight weight;    // without scale and bias
  int32_t* out;     // [m, weight.n]
};

// The schedule of a product and the bytes of its workspace, which is 64-byte aligned.
struct Int8MmPlan {
  const KernelTable* kernels;
  Partition partition;
  RowTiles tiles;
  int64_t activation_bytes;
  int64_t gemm_bytes;  // per task
  int64_t workspace_bytes;
};

Int8MmPlan plan_int8_mm(const Int8Mm& args, const Parallel& parallel);
void int8_mm(const Int8Mm& args, const Int8MmPlan& plan, void* workspace, const Parallel& parallel);

// ---- a whole forward: quantize x, multiply, dequantize ----

struct Linear {
  Rows x;                // m > 0
  Weight weight;         // n > 0
  bool per_tensor;       // one range for all of x; not read with fixed qparams
  const QParams* given;  // fixed qparams; null: chosen from x
  Destination out;
};

// A layer that is one of several in a call.
struct PackedLayer {
  Weight weight;
  Epilogue epilogue;
  Rotation rotation;
  bool per_tensor;  // one range for all rows
};

// Bytes of the pieces of a workspace, in memory order.
struct WorkspaceLayout {
  int64_t activations, qparams, row, gemm;

  int64_t bytes() const { return activations + qparams + row + gemm; }
};

struct LinearPlan {
  const KernelTable* kernels;
  Partition partition;
  RowsPlan range;          // of all of x
  WorkspaceLayout layout;  // per thread with one channel part, else per call
  int64_t workspace_bytes;

  // With one channel part: rows are quantized and multiplied piece by piece.
  int64_t pieces;

  // With several channel parts: all rows are quantized first.
  int64_t quantize_threads;
  RowTiles tiles;
  int64_t gemm_bytes;  // per task
};

LinearPlan plan_linear(const Linear& args, const Parallel& parallel);
void linear(const Linear& args, const LinearPlan& plan, void* workspace, const Parallel& parallel);

}  // namespace dynquant::cpu
