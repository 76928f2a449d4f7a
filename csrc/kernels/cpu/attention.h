// Dynamic int8 attention, over threads: partition and workspace.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace dynquant::cpu {

// A tensor [batch, heads, rows, head_size] with adjacent elements in its last dimension; strides in elements.
struct HeadRows {
  const void* data;
  Dtype dtype;
  int64_t batch_stride, head_stride, row_stride;
};

struct Attention {
  int64_t batch, heads, shared_heads;  // > 0; `shared_heads` of k and v divide `heads`
  int64_t queries, keys, head_size;    // > 0
  HeadRows q, k, v;
  HeadRows out;
  AttentionMask mask;  // of the first head
  int64_t mask_batch_stride, mask_head_stride;
  float scale;
  bool is_causal;
};

struct AttentionPlan {
  const KernelTable* kernels;
  int64_t threads;
  bool by_heads;  // each thread packs the keys of its heads, else all keys are packed first
  int64_t block_bytes, packed_bytes, scratch_bytes;
  int64_t workspace_bytes;  // 64-byte aligned
};

AttentionPlan plan_attention(const Attention& args, const Parallel& parallel);
void attention(const Attention& args, const AttentionPlan& plan, void* workspace, const Parallel& parallel);

}  // namespace dynquant::cpu
