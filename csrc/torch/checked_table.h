// Tables of embeddings and indices among the arguments of a CPU op, with the sentences of
// dynquant/reference/embedding.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "checks.h"
#include "cpu/embedding.h"
#include "cpu/pack.h"

namespace dynquant::cpu {

inline bool is_index(const at::Tensor& x) {
  return x.scalar_type() == at::kLong || x.scalar_type() == at::kInt;
}

// A contiguous int64 tensor with the values of x; `owner` keeps a copy alive.
inline const int64_t* as_int64(const at::Tensor& x, at::Tensor& owner) {
  owner = x.to(at::kLong).contiguous();
  return owner.const_data_ptr<int64_t>();
}

inline void check_index_dtype(const char* op, const at::Tensor& indices) {
  TORCH_CHECK(is_index(indices), op, ": expected indices of dtype int64 or int32, got ",
              dtype_name(indices.scalar_type()));
  check_memory(op, "indices", indices);
}

// The values of indices in [0, n).
inline const int64_t* checked_indices(const char* op, const at::Tensor& indices, int64_t n,
                                      at::Tensor& owner) {
  const int64_t* values = as_int64(indices, owner);
  const int64_t at = find_out_of_range(values, indices.numel(), n);
  TORCH_CHECK(at < 0, op, ": expected indices in [0, ", n, "), got ", values[std::max<int64_t>(at, 0)],
              " at position ", at);
  return values;
}

// Rows of k int8 or a packed weight, with a scale a row.
inline Int8Table checked_table(const char* op, const at::Tensor& indices, const at::Tensor& weight,
                               const at::Tensor& weight_scale, int64_t k) {
  TORCH_CHECK(weight_scale.dim() == 1, op, ": expected weight_scale with 1 dimension, got ",
              weight_scale.dim());
  const int64_t n = weight_scale.size(0);
  check_channels(op, "weight_scale", weight_scale, at::kFloat, n);
  TORCH_CHECK(k >= 0, op, ": expected k of at least 0, got ", k);
  Int8Table table{};
  if (weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k) {
    TORCH_CHECK(weight.scalar_type() == at::kChar && weight.is_contiguous(), op,
                ": expected weight to be contiguous int8, got ", dtype_name(weight.scalar_type()),
                ", contiguous: ", weight.is_contiguous() ? "True" : "False");
    check_memory(op, "weight", weight);
    table.panel = 1;
    table.row_bytes = k;
  } else {
    TORCH_CHECK(weight.dim() == 4, op, ": expected weight to be rows of shape [", n, ", ", k,
                "] or a packed weight, got one of shape ", weight.sizes());
    const auto shape = packed_shape(n, k);
    check_packed(op, weight, shape, n, k);
    table.panel = shape[2];
    table.row_bytes = shape[1] * 4;
  }
  check_device(op, indices, "weight", weight, "indices");
  check_device(op, indices, "weight_scale", weight_scale, "indices");
  table.data = weight.const_data_ptr<int8_t>();
  table.k = k;
  table.scale = weight_scale.const_data_ptr<float>();
  return table;
}

inline void check_out_dtype(const char* op, at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, op,
              ": expected dtype to be float32, bfloat16, float16 or float64, got ", dtype_name(dtype));
}

}  // namespace dynquant::cpu
