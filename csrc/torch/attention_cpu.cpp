// The CPU op attention: check, allocate, call.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "checks.h"
#include "cpu/attention.h"
#include "cpu_call.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

// x [B, H, S, D] in a dtype that the kernels read and with adjacent elements; `owner` keeps a copy alive.
HeadRows head_rows(const Tensor& x, Tensor& owner) {
  owner = x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x;
  if (owner.stride(3) != 1 && owner.size(3) != 1) owner = owner.contiguous();
  return {owner.const_data_ptr(), dtype_of(owner.scalar_type()), owner.stride(0), owner.stride(1),
          owner.stride(2)};
}

// Fills in the mask, whose strides are 0 where it is broadcast.
void set_mask(Attention& args, const Tensor& mask, Tensor& owner) {
  const bool is_bool = mask.scalar_type() == at::kBool;
  const bool is_read = is_bool || mask.scalar_type() == at::kFloat || mask.scalar_type() == at::kBFloat16 ||
                       mask.scalar_type() == at::kHalf;
  owner = (is_read ? mask : mask.to(at::kFloat)).expand({args.batch, args.heads, args.queries, args.keys});
  const MaskType type = is_bool                                ? MaskType::kBool
                        : owner.scalar_type() == at::kBFloat16 ? MaskType::kBFloat16
                        : owner.scalar_type() == at::kHalf     ? MaskType::kFloat16
                                                               : MaskType::kFloat32;
  args.mask = {owner.const_data_ptr(), type, owner.stride(2), owner.stride(3)};
  args.mask_batch_stride = owner.stride(0);
  args.mask_head_stride = owner.stride(1);
}

Tensor attention_op(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                    bool is_causal, std::optional<double> scale) {
  check_attention(q, k, v, mask, scale);
  Attention args{};
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.shared_heads = k.size(1);
  args.queries = q.size(2);
  args.keys = k.size(2);
  args.head_size = q.size(3);
  const at::ScalarType wanted = q.scalar_type(), computed = wanted == at::kDouble ? at::kFloat : wanted;
  // Dense as [B, S, H, D], from which the input of an output projection is a view.
  Tensor out = at::empty({args.batch, args.queries, args.heads, args.head_size}, q.options().dtype(computed))
                   .transpose(1, 2);
  if (args.keys == 0) out.zero_();
  if (out.numel() > 0 && args.keys > 0) {
    Tensor q_owner, k_owner, v_owner, mask_owner;
    args.q = head_rows(q, q_owner);
    args.k = head_rows(k, k_owner);
    args.v = head_rows(v, v_owner);
    args.out = {out.mutable_data_ptr(), dtype_of(computed), out.stride(0), out.stride(1), out.stride(2)};
    if (mask.has_value()) set_mask(args, *mask, mask_owner);
    args.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(args.head_size))));
    args.is_causal = is_causal;
    const AttentionPlan plan = plan_attention(args, torch_threads());
    Scratch scratch(plan.workspace_bytes);
    attention(args, plan, scratch.data(), torch_threads());
  }
  return wanted == computed ? out : out.to(wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) { m.impl("attention", attention_op); }

}  // namespace dynquant::cpu
