// A recurrent layer in one direction, over threads: the products of the input, piece by piece for several
// time steps, then these steps one after the other.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"

namespace dynquant::cpu {

// Rows of x and out are time steps, and within each the sequences that are not over. P is the size of h.
struct Rnn {
  RnnCell cell;
  Rows x;                          // m: of all steps
  const PackedLayer* input_layer;  // null: float_input
  const FloatLayer* float_input;   // a narrow input, in fp32
  PackedLayer hidden_layer;
  const PackedLayer* projection;  // [P][hidden], LSTM alone; null: P = hidden
  int64_t steps, batch;           // batch > 0
  const int64_t* sizes;           // sequences at each step, falling from `batch`; null: `batch` at each
  bool reverse;                   // the last step comes first
  float *h, *c;                   // [batch][P] and, LSTM alone, [batch][hidden]: from first to last values
  Destination out;                // [m][P]; its epilogue is not read

  int64_t gated() const { return hidden_layer.weight.n; }  // channels of both layers
  int64_t hidden() const { return hidden_layer.weight.n / gates_of(cell); }
  // Whether weights of the steps may hold -128.
  bool full_range() const {
    return hidden_layer.weight.full_range || (projection != nullptr && projection->weight.full_range);
  }
  int64_t size_at(int64_t step) const { return sizes != nullptr ? sizes[step] : batch; }
};

struct RnnPlan {
  int64_t parts;           // threads, each with sequences of its own; 0: each step uses all threads
  int64_t rows;            // of the input, multiplied at a time
  WorkspaceLayout layout;  // of a part's products
  int64_t products_bytes;  // of a part, or of the call if each step uses all threads
  int64_t input_bytes;     // for the products of the input; before them, their workspace
  int64_t workspace_bytes;
};

RnnPlan plan_rnn(const Rnn& args, const Parallel& parallel);
void rnn(const Rnn& args, const RnnPlan& plan, void* workspace, const Parallel& parallel);

}  // namespace dynquant::cpu
