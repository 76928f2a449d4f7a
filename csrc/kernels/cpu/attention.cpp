#include "cpu/attention.h"

#include <algorithm>

#include "cpu/isa/dispatch.h"
#include "cpu/partition.h"

namespace dynquant::cpu {
namespace {

// Queries that a thread takes at once where threads share heads.
constexpr int64_t kQueriesAtOnce = 48;

Rows rows_of_head(const HeadRows& x, int64_t b, int64_t h, int64_t rows, int64_t head_size) {
  const int64_t at = b * x.batch_stride + h * x.head_stride;
  return {static_cast<const uint8_t*>(x.data) + at * element_size(x.dtype),
          x.dtype,
          rows,
          head_size,
          x.row_stride,
          kNoRotation};
}

// Head h of batch b.
AttentionHead head_of(const Attention& args, int64_t b, int64_t h) {
  const Rows out = rows_of_head(args.out, b, h, args.queries, args.head_size);
  AttentionMask mask = args.mask;
  if (mask.type != MaskType::kNone) {
    const int64_t at = b * args.mask_batch_stride + h * args.mask_head_stride;
    mask.data = static_cast<const uint8_t*>(mask.data) + at * element_size(mask.type);
  }
  return {rows_of_head(args.q, b, h, args.queries, args.head_size),
          args.keys,
          args.scale * 1.44269502f,
          mask,
          args.is_causal,
          Destination{const_cast<void*>(out.data), out.stride, out.dtype, Epilogue::kNone}};
}

// Packs blocks [b0, b1) of head `shared` of all heads of k and v.
void pack(const Attention& args, const AttentionPlan& plan, int64_t shared, int64_t b0, int64_t b1,
          uint8_t* packed) {
  const int64_t b = shared / args.shared_heads, h = shared % args.shared_heads;
  const Rows k = rows_of_head(args.k, b, h, args.keys, args.head_size);
  const Rows v = rows_of_head(args.v, b, h, args.keys, args.head_size);
  for (int64_t i = b0; i < b1; ++i) plan.kernels->pack_keys(k, v, i, packed + i * plan.block_bytes);
}

// The products of a plan depend on the activations; a tile of queries is too small to make one.
const KernelTable& kernels_without_plans() {
  const KernelTable& table = kernels();
  return table.few_rows != nullptr ? *table.few_rows : table;
}

}  // namespace

AttentionPlan plan_attention(const Attention& args, const Parallel& parallel) {
  const KernelTable& kernels = kernels_without_plans();
  // A score takes about as long as a product with 64 keys, whatever the head size.
  const double scores = static_cast<double>(args.batch * args.heads) * static_cast<double>(args.queries) *
                        static_cast<double>(args.keys);
  const double operations = scores * (4.0 * static_cast<double>(args.head_size) + 128.0);
  const int64_t shared = args.batch * args.shared_heads, blocks = divide_up(args.keys, kKeyBlock);
  AttentionPlan plan{};
  plan.kernels = &kernels;
  plan.threads = threads_for(operations / (kernels.gops * 1e3), parallel);
  plan.by_heads = shared % plan.threads == 0 || shared >= 4 * plan.threads;
  plan.block_bytes = kernels.key_block_bytes(args.head_size);
  plan.packed_bytes = blocks * plan.block_bytes;
  plan.scratch_bytes = kernels.attention_scratch(args.head_size, blocks);
  plan.workspace_bytes =
      (plan.by_heads ? plan.threads : shared) * plan.packed_bytes + plan.threads * plan.scratch_bytes;
  return plan;
}

void attention(const Attention& args, const AttentionPlan& plan, void* workspace, const Parallel& parallel) {
  const int64_t group = args.heads / args.shared_heads, shared = args.batch * args.shared_heads;
  const int64_t blocks = divide_up(args.keys, kKeyBlock), threads = plan.threads;
  uint8_t* scratch = static_cast<uint8_t*>(workspace);
  uint8_t* packed = scratch + threads * plan.scratch_bytes;
  const auto attend = [&](int64_t t, int64_t head, int64_t begin, int64_t end, const uint8_t* keys) {
    plan.kernels->attend(head_of(args, head / args.heads, head % args.heads), begin, end, keys,
                         scratch + t * plan.scratch_bytes);
  };
  if (plan.by_heads) {
    parallel.run(*plan.kernels->scope, threads, [&](int64_t t) {
      uint8_t* keys = packed + t * plan.packed_bytes;
      const auto [s0, s1] = share(shared, threads, t);
      for (int64_t s = s0; s < s1; ++s) {
        pack(args, plan, s, 0, blocks, keys);
        for (int64_t h = s * group; h < (s + 1) * group; ++h) attend(t, h, 0, args.queries, keys);
      }
    });
    return;
  }
  parallel.run(*plan.kernels->scope, threads, [&](int64_t t) {
    const auto [u0, u1] = share(shared * blocks, threads, t);
    for (int64_t u = u0; u < u1; ++u) {
      const int64_t s = u / blocks, b = u % blocks;
      pack(args, plan, s, b, b + 1, packed + s * plan.packed_bytes);
    }
  });
  // In turn, since later queries see more keys of a causal call.
  const int64_t pieces = divide_up(args.queries, kQueriesAtOnce), units = shared * group * pieces;
  parallel.run(*plan.kernels->scope, threads, [&](int64_t t) {
    for (int64_t u = t; u < units; u += threads) {
      const int64_t head = u / pieces;
      const auto [begin, end] = share(args.queries, pieces, u % pieces);
      attend(t, head, begin, end, packed + head / group * plan.packed_bytes);
    }
  });
}

}  // namespace dynquant::cpu
