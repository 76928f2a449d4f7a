// The CPU op embedding_norm: check, allocate, call. The sentences are those of
// dynquant/reference/embedding_norm.py.

#include <ATen/TensorUtils.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "checked_norm.h"
#include "checked_table.h"
#include "checks.h"
#include "cpu/embedding.h"
#include "cpu_call.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

// Whether `indices` broadcasts to `shape`.
bool broadcasts(at::IntArrayRef indices, at::IntArrayRef shape) {
  if (indices.size() > shape.size()) return false;
  const auto last = shape.slice(shape.size() - indices.size());
  for (size_t d = 0; d < indices.size(); ++d) {
    if (indices[d] != 1 && indices[d] != last[d]) return false;
  }
  return true;
}

// Whether the elements of `indices` follow each other as the last ones of `shape` do, over and over.
bool repeats(at::IntArrayRef indices, at::IntArrayRef shape) {
  const auto last = shape.slice(shape.size() - indices.size());
  size_t d = 0;
  while (d < indices.size() && indices[d] == 1) ++d;
  for (; d < indices.size(); ++d) {
    if (indices[d] != last[d]) return false;
  }
  return true;
}

// One of the tables; an instance keeps its tensors alive.
struct CheckedTable {
  IndexedTable table{};
  Tensor owner, index_owner;

  CheckedTable(size_t number, const Tensor& indices, const Tensor& values, const std::optional<Tensor>& scale,
               const Tensor& first, int64_t k)
      : owner(values) {
    const std::string named = "embedding_norm, table " + std::to_string(number);
    const char* op = named.c_str();
    check_index_dtype(op, indices);
    check_device("embedding_norm", first, "indices", indices, "indices");
    TORCH_CHECK(broadcasts(indices.sizes(), first.sizes()), op, ": expected indices that broadcast to ",
                first.sizes(), ", got ", indices.sizes());
    int64_t n = 0;
    if (scale.has_value()) {
      table.int8 = checked_table(op, indices, values, *scale, k);
      n = scale->size(0);
    } else {
      const auto type = values.scalar_type();
      TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
                  ": expected a table of dtype float32, bfloat16 or float16, or int8 with a scale, got ",
                  dtype_name(type));
      TORCH_CHECK(values.dim() == 2 && values.size(1) == k, op, ": expected rows of shape [N, ", k, "], got ",
                  values.sizes());
      TORCH_CHECK(k <= 1 || values.stride(1) == 1, op, ": expected rows with adjacent elements, got stride ",
                  k <= 1 ? 1 : values.stride(1));
      check_memory(op, "rows", values);
      check_device(op, indices, "rows", values, "indices");
      n = values.size(0);
      table.rows = {values.const_data_ptr(), dtype_of(type), n, k, values.stride(0), kNoRotation};
    }
    const bool is_whole = repeats(indices.sizes(), first.sizes());
    const Tensor read = is_whole ? indices : indices.expand(first.sizes());
    table.indices = checked_indices(op, read, n, index_owner);
    table.count = read.numel();
  }
};

Tensor embedding_norm_op(at::TensorList indices, at::TensorList tables, const Tensors& scales, int64_t k,
                         const Tensors& norm_out, double eps, int64_t norm, at::ScalarType dtype) {
  const char* op = "embedding_norm";
  TORCH_CHECK(!indices.empty() && tables.size() == indices.size() && scales.size() == indices.size(), op,
              ": expected at least one table, with indices and a scale (or None) each, got ", tables.size(),
              " tables, ", indices.size(), " indices and ", scales.size(), " scales");
  TORCH_CHECK(k >= 0, op, ": expected k of at least 0, got ", k);
  check_out_dtype(op, dtype);
  const Tensor& first = indices[0];
  std::vector<CheckedTable> checked;
  std::vector<IndexedTable> read;
  checked.reserve(tables.size());
  read.reserve(tables.size());
  for (size_t t = 0; t < tables.size(); ++t) {
    checked.emplace_back(t, indices[t], tables[t], scales.get(t), first, k);
    read.push_back(checked.back().table);
  }
  const CheckedNorm after(op, "norm_out", norm_out, first, k, eps, norm, "indices");
  const at::ScalarType computed = dtype == at::kDouble ? at::kFloat : dtype;
  c10::SmallVector<int64_t, 5> shape(first.sizes().begin(), first.sizes().end());
  shape.push_back(k);
  Tensor out = at::empty(shape, tables[0].options().dtype(computed));
  if (out.numel() > 0) {
    const EmbeddingNorm args{
        read.data(), static_cast<int64_t>(read.size()),
        after.norm,  first.numel(),
        k,           Destination{out.mutable_data_ptr(), k, dtype_of(computed), Epilogue::kNone}};
    const EmbeddingNormPlan plan = plan_embedding_norm(args, torch_threads());
    Scratch scratch(plan.workspace_bytes);
    embedding_norm(args, plan, scratch.data(), torch_threads());
  }
  return dtype == computed ? out : cast(out, at::kDouble);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) { m.impl("embedding_norm", embedding_norm_op); }

}  // namespace dynquant::cpu
