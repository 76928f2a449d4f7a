// Rows of x and of a weight: ranges, qparams, rotation and quantization, over threads.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace dynquant::cpu {

// Floats of scratch per thread, for the row that it rotates.
inline int64_t row_scratch(const Rows& x) { return x.rotation.block > 0 ? row_floats(x.k) : 0; }

// The number of threads and the bytes of their workspace, which is 64-byte aligned.
struct RowsPlan {
  int64_t threads, workspace_bytes;
};

// ---- rows of x ----

// The range of each row, without rotation.
void min_max_rows(const Rows& x, float* lo, float* hi, const Parallel& parallel);

// The range of all rows together, on at least `least_threads` threads.
RowsPlan plan_min_max(const Rows& x, int64_t least_threads, const Parallel& parallel);
Range min_max(const Rows& x, const RowsPlan& plan, void* workspace, const Parallel& parallel);

// scale and zero_point of `count` ranges; NaN and 0 for a range that is not finite.
void choose_qparams(const float* lo, const float* hi, int64_t count, float* scale, int32_t* zero_point);

// q: [m, k]. One pair of qparams, or one per row.
void quantize(const Rows& x, const float* scale, const int32_t* zero_point, bool per_row, int8_t* q,
              const Parallel& parallel);

// out: [m, k].
void rotate(const Rows& x, float* out, const Parallel& parallel);

// Row m in fp32, without rotation.
void read_row(const Rows& x, int64_t m, float* out);

// ---- rows of a weight ----

struct QuantizeWeight {
  Rows weight;
  bool per_tensor;  // one scale instead of one per row
  float* scale;     // [n], or [1]
  int8_t* q;        // [n, k]
};

RowsPlan plan_quantize_weight(const QuantizeWeight& args, const Parallel& parallel);

// Returns the first row with a non-finite element after rotation (outputs are then incomplete), or -1.
int64_t quantize_weight(const QuantizeWeight& args, const RowsPlan& plan, void* workspace,
                        const Parallel& parallel);

}  // namespace dynquant::cpu
