// The CUDA ops that multiply by a packed weight: check, allocate, launch.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "checks.h"
#include "cuda/kernels.h"
#include "cuda_call.h"

namespace dynquant::cuda {
namespace {

using at::Tensor;

// Rows of a packed weight are padded with zeros to multiples of 16 bytes.
void check_packed_rows(const char* op, const Tensor& packed_weight, int64_t n, int64_t k) {
  check_packed(op, packed_weight, {n, (k + 15) / 16 * 16}, n, k);
}

// A packed weight in the alignment that the kernels require, multiples of 16 bytes. Memory of torch's
// allocator has it; a view into another storage may not, and is copied. `owner` keeps the copy alive.
const int8_t* aligned_rows(const Tensor& packed_weight, Tensor& owner) {
  const auto* rows = packed_weight.const_data_ptr<int8_t>();
  if (reinterpret_cast<uintptr_t>(rows) % 16 == 0) return rows;
  owner = packed_weight.clone();
  return owner.const_data_ptr<int8_t>();
}

Tensor int8_mm_op(const Tensor& q, const Tensor& packed_weight, const Tensor& weight_sum) {
  if (is_too_old(q))
    return run_reference<decltype(int8_mm_op)>("dynquant::int8_mm", q, packed_weight, weight_sum);
  check_int8_mm(q, packed_weight, weight_sum);
  const int64_t m = q.size(0), k = q.size(1), n = weight_sum.size(0);
  check_packed_rows("int8_mm", packed_weight, n, k);
  const OnDevice on("int8_mm", q);
  const Tensor rows = q.contiguous();
  Tensor weight_owner;
  Tensor out = at::empty({m, n}, q.options().dtype(at::kInt));
  const Int8Mm args = {rows.const_data_ptr<int8_t>(),  aligned_rows(packed_weight, weight_owner), m, n, k,
                       out.mutable_data_ptr<int32_t>()};
  const Int8MmPlan plan = plan_int8_mm(args, on.properties());
  const Tensor workspace = workspace_of(q, plan.workspace_bytes);
  on.check(int8_mm(args, plan, on.properties(), data_of(workspace), on.stream()));
  return out;
}

// scale, zero_point: arguments of linear_static, null for linear_dynamic.
Tensor linear_op(const char* op, const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                 const Tensor& weight_scale, const std::optional<Tensor>& bias, const Tensor* scale,
                 const Tensor* zero_point, int64_t code) {
  check_linear(op, x, packed_weight, weight_sum, weight_scale, bias);
  const Config config = check_config(code);
  const int64_t n = weight_scale.size(0), k = x.size(-1);
  check_packed_rows(op, packed_weight, n, k);
  check_k(op, k, code);
  if (config.rotation.block > 0) check_rotation(op, k, config.rotation.block);

  const OnDevice on(op, x);
  Tensor owner, weight_owner, bias_owner;
  const Rows rows = rows_of(x, config.rotation, owner);
  // fp64 outputs are computed in fp32.
  const at::ScalarType wanted = out_dtype(config, x);
  const at::ScalarType computed = wanted == at::kDouble ? at::kFloat : wanted;
  c10::SmallVector<int64_t, 5> out_shape(x.sizes().begin(), x.sizes().end());
  out_shape.back() = n;
  Tensor out = at::empty(out_shape, x.options().dtype(computed));

  // The kernels read a bias of 2 bytes an element too: a cast would be a launch of its own.
  const bool narrow = bias.has_value() && bias->element_size() == 2 && bias->is_contiguous();
  const Linear args = {rows,
                       n,
                       aligned_rows(packed_weight, weight_owner),
                       weight_sum.const_data_ptr<int32_t>(),
                       weight_scale.const_data_ptr<float>(),
                       narrow ? bias->const_data_ptr() : in_fp32(bias, bias_owner),
                       scale != nullptr ? scale->const_data_ptr<float>() : nullptr,
                       zero_point != nullptr ? zero_point->const_data_ptr<int32_t>() : nullptr,
                       config,
                       out.mutable_data_ptr(),
                       dtype_of(computed),
                       narrow ? dtype_of(bias->scalar_type()) : Dtype::kFloat32};
  const LinearPlan plan = plan_linear(args, on.properties());
  const Tensor workspace = workspace_of(x, plan.workspace_bytes);
  on.check(linear(args, plan, on.properties(), data_of(workspace), on.stream()));
  return wanted == computed ? out : out.to(wanted);
}

Tensor linear_dynamic_op(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                         const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t config) {
  if (is_too_old(x))
    return run_reference<decltype(linear_dynamic_op)>("dynquant::linear_dynamic", x, packed_weight,
                                                      weight_sum, weight_scale, bias, config);
  return linear_op("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias, nullptr, nullptr,
                   config);
}

Tensor linear_static_op(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                        const Tensor& weight_scale, const std::optional<Tensor>& bias, const Tensor& scale,
                        const Tensor& zero_point, int64_t config) {
  if (is_too_old(x))
    return run_reference<decltype(linear_static_op)>("dynquant::linear_static", x, packed_weight, weight_sum,
                                                     weight_scale, bias, scale, zero_point, config);
  check_qparams("linear_static", 1, scale, zero_point);
  check_device("linear_static", x, "scale", scale);
  check_device("linear_static", x, "zero_point", zero_point);
  return linear_op("linear_static", x, packed_weight, weight_sum, weight_scale, bias, &scale, &zero_point,
                   config);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CUDA, m) {
  m.impl("int8_mm", int8_mm_op);
  m.impl("linear_dynamic", linear_dynamic_op);
  m.impl("linear_static", linear_static_op);
}

}  // namespace dynquant::cuda
