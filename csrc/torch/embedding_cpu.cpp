// The CPU ops embedding and embedding_bag: check, allocate, call. The sentences are those of
// dynquant/reference/embedding.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/embedding.h"
#include "cpu/pack.h"
#include "cpu_call.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

bool is_index(const Tensor& x) { return x.scalar_type() == at::kLong || x.scalar_type() == at::kInt; }

// A contiguous int64 tensor with the values of x; `owner` keeps a copy alive.
const int64_t* as_int64(const Tensor& x, Tensor& owner) {
  owner = x.to(at::kLong).contiguous();
  return owner.const_data_ptr<int64_t>();
}

// The checks of both ops, and what the kernel reads of the table.
EmbeddingBags table_of(const char* op, const Tensor& indices, const Tensor& weight,
                       const Tensor& weight_scale, int64_t k, at::ScalarType dtype) {
  TORCH_CHECK(is_index(indices), op, ": expected indices of dtype int64 or int32, got ",
              dtype_name(indices.scalar_type()));
  check_memory(op, "indices", indices);
  TORCH_CHECK(weight_scale.dim() == 1, op, ": expected weight_scale with 1 dimension, got ",
              weight_scale.dim());
  const int64_t n = weight_scale.size(0);
  check_channels(op, "weight_scale", weight_scale, at::kFloat, n);
  TORCH_CHECK(k >= 0, op, ": expected k of at least 0, got ", k);
  EmbeddingBags args{};
  if (weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k) {
    TORCH_CHECK(weight.scalar_type() == at::kChar && weight.is_contiguous(), op,
                ": expected weight to be contiguous int8, got ", dtype_name(weight.scalar_type()),
                ", contiguous: ", weight.is_contiguous() ? "True" : "False");
    check_memory(op, "weight", weight);
    args.panel = 1;
    args.row_bytes = k;
  } else {
    TORCH_CHECK(weight.dim() == 4, op, ": expected weight to be rows of shape [", n, ", ", k,
                "] or a packed weight, got one of shape ", weight.sizes());
    const auto shape = packed_shape(n, k);
    check_packed(op, weight, shape, n, k);
    args.panel = shape[2];
    args.row_bytes = shape[1] * 4;
  }
  check_device(op, indices, "weight", weight, "indices");
  check_device(op, indices, "weight_scale", weight_scale, "indices");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, op,
              ": expected dtype to be float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
  args.table = weight.const_data_ptr<int8_t>();
  args.k = k;
  args.scale = weight_scale.const_data_ptr<float>();
  args.padding_index = -1;
  return args;
}

void set_indices(const char* op, const Tensor& indices, int64_t n, EmbeddingBags& args, Tensor& owner) {
  args.indices = as_int64(indices, owner);
  args.count = indices.numel();
  const int64_t at = find_out_of_range(args.indices, args.count, n);
  TORCH_CHECK(at < 0, op, ": expected indices in [0, ", n, "), got ", args.indices[std::max<int64_t>(at, 0)],
              " at position ", at);
}

Tensor reduced(EmbeddingBags& args, at::IntArrayRef shape, const Tensor& weight, at::ScalarType dtype) {
  const at::ScalarType computed = dtype == at::kDouble ? at::kFloat : dtype;
  Tensor out = at::empty(shape, weight.options().dtype(computed));
  args.out = {out.mutable_data_ptr(), args.k, dtype_of(computed), Epilogue::kNone};
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
