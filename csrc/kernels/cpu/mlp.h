// Layers with the norms and residuals around them, and whole MLPs: rows pass all steps piece by piece, so
// that the values between the layers stay in a core's caches.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"

namespace dynquant::cpu {

// With layer alone:  out = norm_out(layer(norm_in(x)) + residual)
// With up and down:  out = norm_out(mlp(norm_in(x)) + residual), mlp(v) = down(up(v)), or gated
//                    down(gate(v) * up(v))
// With all three:    h = layer(x) + residual
//                    post-norm  h = norm_in(h), out = norm_out(mlp(h) + h)
//                    pre-norm   out = mlp(norm_in(h)) + h
struct Mlp {
  Rows x;  // m > 0
  Norm norm_in, norm_out;
  const PackedLayer *layer, *gate, *up, *down;  // null: absent
  const Rows* residual;                         // or null
  bool pre_norm;
  Destination out;  // its epilogue is not read
};

struct MlpPlan {
  const KernelTable* kernels;
  int64_t threads;  // of the pieces; 0: rows are too few, so each step uses all threads for all rows
  int64_t pieces;
  WorkspaceLayout layout;  // of a piece's products
  int64_t products_bytes;  // of a thread, or of the call if each step uses all threads
  int64_t workspace_bytes;
};

MlpPlan plan_mlp(const Mlp& args, const Parallel& parallel);
void mlp(const Mlp& args, const MlpPlan& plan, void* workspace, const Parallel& parallel);

}  // namespace dynquant::cpu
