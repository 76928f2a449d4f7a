// Rows of an int8 table with a scale a row, reductions of bags of them, and sums of rows of several tables
// with a norm: embedding, embedding_bag and embedding_norm.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace dynquant::cpu {

// Position of the first index outside of [0, n), or -1 if there is none.
int64_t find_out_of_range(const int64_t* indices, int64_t count, int64_t n);

// All bags. The indices must be in range, the offsets increase from 0 to at most args.end.
void embedding_bags(const EmbeddingBags& args, const Parallel& parallel);

struct EmbeddingNormPlan {
  int64_t threads, sums_bytes;  // of one thread
  int64_t workspace_bytes;      // 64-byte aligned
};

EmbeddingNormPlan plan_embedding_norm(const EmbeddingNorm& args, const Parallel& parallel);
void embedding_norm(const EmbeddingNorm& args, const EmbeddingNormPlan& plan, void* workspace,
                    const Parallel& parallel);

}  // namespace dynquant::cpu
