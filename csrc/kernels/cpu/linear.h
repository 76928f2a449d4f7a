// Products with a packed weight, over threads: which of them does which part of the work, and where it keeps what it
// computes on the way.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace dynquant::cpu {

// A GEMM in parts: of its rows first (each thread quantizes its own), of its channels where there are too few rows.
struct Partition {
  int64_t row_parts, channel_parts;

  int64_t tasks() const { return row_parts * channel_parts; }
};

// ---- out[m, n] = sum over k of q[m, k] * weight[n, k], int32 ----------------------------------------------------------

struct Int8Mm {
  const int8_t* q;  // [m, weight.k]
  int64_t m;        // > 0, as is weight.n
  Weight weight;    // without scale and bias
  int32_t* out;     // [m, weight.n]
};

// How it is computed, and the bytes of workspace (64-byte aligned) for that.
struct Int8MmPlan {
  const KernelTable* kernels;
  Partition partition;
  RowTiles tiles;
  int64_t operand_bytes;
  int64_t gemm_bytes;  // of each task
  int64_t workspace_bytes;
};

Int8MmPlan plan_int8_mm(const Int8Mm& args, const Parallel& parallel);
void int8_mm(const Int8Mm& args, const Int8MmPlan& plan, void* workspace, const Parallel& parallel);

// ---- a whole forward: x is quantized, multiplied, dequantized ---------------------------------------------------------

struct Linear {
  Rows x;                // m > 0
  Weight weight;         // n > 0
  bool per_tensor;       // one range for all of x, if no qparams are given
  const QParams* given;  // fixed qparams; null: they are chosen from x
  Output out;
};

// Bytes of the pieces of a workspace, in the order in which they lie.
struct WorkspaceLayout {
  int64_t operand, qparams, row, gemm;

  int64_t bytes() const { return operand + qparams + row + gemm; }
};

struct LinearPlan {
  const KernelTable* kernels;
  Partition partition;
  RowsPlan range;          // of all of x
  WorkspaceLayout layout;  // of each thread, where channels are in one part; else of the call
  int64_t workspace_bytes;

  // Channels in one part: rows are quantized and multiplied piece by piece.
  int64_t pieces;

  // Channels in several parts: all rows are quantized before.
  int64_t quantize_threads;
  RowTiles tiles;
  int64_t gemm_bytes;  // of each task
};

LinearPlan plan_linear(const Linear& args, const Parallel& parallel);
void linear(const Linear& args, const LinearPlan& plan, void* workspace, const Parallel& parallel);

}  // namespace dynquant::cpu
