// The CPU ops embedding and embedding_bag: check, allocate, call. The sentences are those of
// dynquant/reference/embedding.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "checked_table.h"
#include "checks.h"
#include "cpu/embedding.h"
#include "cpu_call.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

// The checks of both ops, and what the kernel reads of the table.
EmbeddingBags table_of(const char* op, const Tensor& indices, const Tensor& weight,
                       const Tensor& weight_scale, int64_t k, at::ScalarType dtype) {
  check_index_dtype(op, indices);
  EmbeddingBags args{};
  args.table = checked_table(op, indices, weight, weight_scale, k);
  check_out_dtype(op, dtype);
  args.padding_index = -1;
  return args;
}

void set_indices(const char* op, const Tensor& indices, int64_t n, EmbeddingBags& args, Tensor& owner) {
  args.indices = checked_indices(op, indices, n, owner);
  args.count = indices.numel();
}

Tensor reduced(EmbeddingBags& args, at::IntArrayRef shape, const Tensor& weight, at::ScalarType dtype) {
  const at::ScalarType computed = dtype == at::kDouble ? at::kFloat : dtype;
  Tensor out = at::empty(shape, weight.options().dtype(computed));
  args.out = {out.mutable_data_ptr(), args.table.k, dtype_of(computed), Epilogue::kNone};
  if (out.numel() > 0) embedding_bags(args, torch_threads());
  return dtype == computed ? out : cast(out, at::kDouble);
}

Tensor embedding_op(const Tensor& indices, const Tensor& weight, const Tensor& weight_scale, int64_t k,
                    at::ScalarType dtype) {
  const char* op = "embedding";
  EmbeddingBags args = table_of(op, indices, weight, weight_scale, k, dtype);
  Tensor owner;
  set_indices(op, indices, weight_scale.size(0), args, owner);
  args.bags = args.end = args.count;
  std::vector<int64_t> shape = indices.sizes().vec();
  shape.push_back(k);
  return reduced(args, shape, weight, dtype);
}

// From 0 on, not decreasing, at most the number of indices.
void check_offsets(const int64_t* offsets, int64_t count, int64_t length) {
  const char* op = "embedding_bag";
  if (count == 0) return;
  TORCH_CHECK(offsets[0] == 0, op, ": expected offsets[0] to be 0, got ", offsets[0]);
  for (int64_t i = 1; i < count; ++i) {
    TORCH_CHECK(offsets[i - 1] <= offsets[i], op, ": expected offsets that do not decrease, got ",
                offsets[i - 1], " and then ", offsets[i], " at offsets[", i, "]");
  }
  TORCH_CHECK(offsets[count - 1] <= length, op, ": expected offsets of at most ", length,
              ", the number of indices, got ", offsets[count - 1]);
}

Tensor embedding_bag_op(const Tensor& indices, const Tensor& offsets, const Tensor& weight,
                        const Tensor& weight_scale, const std::optional<Tensor>& per_sample_weights,
                        int64_t k, int64_t mode, bool include_last_offset, int64_t padding_idx,
                        at::ScalarType dtype) {
  const char* op = "embedding_bag";
  EmbeddingBags args = table_of(op, indices, weight, weight_scale, k, dtype);
  TORCH_CHECK(indices.dim() == 1, op, ": expected indices with 1 dimension, got ", indices.dim());
  TORCH_CHECK(is_index(offsets) && offsets.dim() == 1, op,
              ": expected offsets of dtype int64 or int32 with 1 dimension, got ",
              dtype_name(offsets.scalar_type()), " with ", offsets.dim());
  check_memory(op, "offsets", offsets);
  check_device(op, indices, "offsets", offsets, "indices");
  TORCH_CHECK(offsets.size(0) > 0 || !include_last_offset, op,
              ": expected at least 1 offset with include_last_offset, got 0");
  TORCH_CHECK(mode >= 0 && mode <= 2, op, ": expected mode to be 0 (sum), 1 (mean) or 2 (max), got ", mode);
  Tensor weights_owner;
  if (per_sample_weights.has_value()) {
    const Tensor& weights = *per_sample_weights;
    TORCH_CHECK(mode == 0, op, ": expected per_sample_weights with mode 'sum' alone, got mode ",
                mode == 1 ? "'mean'" : "'max'");
    TORCH_CHECK(at::isFloatingType(weights.scalar_type()) && weights.sizes() == indices.sizes(), op,
                ": expected per_sample_weights of a float dtype and of shape ", indices.sizes(), ", got ",
                dtype_name(weights.scalar_type()), " of shape ", weights.sizes());
    check_memory(op, "per_sample_weights", weights);
    check_device(op, indices, "per_sample_weights", weights, "indices");
    weights_owner = weights.scalar_type() == at::kDouble ? cast(weights, at::kFloat)
                                                         : weights.to(at::kFloat).contiguous();
    args.weights = weights_owner.const_data_ptr<float>();
  }
  Tensor indices_owner, offsets_owner;
  set_indices(op, indices, weight_scale.size(0), args, indices_owner);
  args.offsets = as_int64(offsets, offsets_owner);
  check_offsets(args.offsets, offsets.numel(), args.count);
  args.bags = offsets.numel() - (include_last_offset ? 1 : 0);
  args.end = include_last_offset ? args.offsets[args.bags] : args.count;
  args.padding_index = padding_idx;
  args.mode = static_cast<BagMode>(mode);
  return reduced(args, {args.bags, k}, weight, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) {
  m.impl("embedding", embedding_op);
  m.impl("embedding_bag", embedding_bag_op);
}

}  // namespace dynquant::cpu
