// The CPU ops that multiply by a packed weight: check, allocate, call.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "checks.h"
#include "cpu_call.h"
#include "cpu/isa/dispatch.h"
#include "cpu/linear.h"
#include "cpu/pack.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

Tensor int8_mm_op(const Tensor& q, const Tensor& packed_weight, const Tensor& weight_sum) {
  check_int8_mm(q, packed_weight, weight_sum);
  const int64_t m = q.size(0), k = q.size(1), n = weight_sum.numel();
  const auto shape = packed_shape(n, k);
  check_packed("int8_mm", packed_weight, shape, n, k);
  Tensor out = at::empty({m, n}, q.options().dtype(at::kInt));
  if (m == 0 || n == 0) return out;

  const Tensor rows = q.contiguous();
  const int8_t* packed = packed_weight.const_data_ptr<int8_t>();
  const bool full_range =
      kernels().full_range != nullptr && find_minus_128(packed, packed_weight.numel()) >= 0;
  const Weight weight{packed,  n,       k,         shape[2], weight_sum.const_data_ptr<int32_t>(),
                      nullptr, nullptr, full_range};
  const Int8Mm args{rows.const_data_ptr<int8_t>(), m, weight, out.mutable_data_ptr<int32_t>()};
  const Int8MmPlan plan = plan_int8_mm(args, torch_threads());
  Scratch scratch(plan.workspace_bytes);
  int8_mm(args, plan, scratch.data(), torch_threads());
  return out;
}

const float* bias_of(const std::optional<Tensor>& bias, Tensor& owner) {
  if (!bias.has_value() || bias->scalar_type() != at::kDouble) return in_fp32(bias, owner);
  owner = cast(*bias, at::kFloat);
  return owner.const_data_ptr<float>();
}

// given: the qparams of linear_static, null for linear_dynamic.
Tensor linear_op(const char* op, const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                 const Tensor& weight_scale, const std::optional<Tensor>& bias, const QParams* given,
                 int64_t code) {
  check_linear(op, x, packed_weight, weight_sum, weight_scale, bias);
  const Config config = check_config(code);
  const int64_t m = leading_size(x), n = weight_scale.size(0), k = x.size(-1);
  const auto shape = packed_shape(n, k);
  check_packed(op, packed_weight, shape, n, k);
  check_k(op, k, code);
  if (config.rotation.block > 0) check_rotation(op, k, config.rotation.block);

  // fp64 is computed through fp32.
  const at::ScalarType wanted = out_dtype(config, x);
  const at::ScalarType computed = wanted == at::kDouble ? at::kFloat : wanted;
  c10::SmallVector<int64_t, 5> out_shape(x.sizes().begin(), x.sizes().end());
  out_shape.back() = n;
  Tensor out = at::empty(out_shape, x.options().dtype(computed));
  if (m == 0 || n == 0) return wanted == computed ? out : out.to(wanted);

  Tensor owner, bias_owner;
  const Linear args{
      rows_of(x, config.rotation, owner),
      Weight{packed_weight.const_data_ptr<int8_t>(), n, k, shape[2], weight_sum.const_data_ptr<int32_t>(),
             weight_scale.const_data_ptr<float>(), bias_of(bias, bias_owner), config.full_range},
      config.per_tensor, given, Destination{out.mutable_data_ptr(), n, dtype_of(computed), config.epilogue}};
  const LinearPlan plan = plan_linear(args, torch_threads());
  Scratch scratch(plan.workspace_bytes);
  linear(args, plan, scratch.data(), torch_threads());
  return wanted == computed ? out : cast(out, wanted);
}

Tensor linear_dynamic_op(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                         const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t config) {
  return linear_op("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias, nullptr, config);
}

Tensor linear_static_op(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                        const Tensor& weight_scale, const std::optional<Tensor>& bias, const Tensor& scale,
                        const Tensor& zero_point, int64_t config) {
  check_qparams("linear_static", 1, scale, zero_point);
  check_device("linear_static", x, "scale", scale);
  check_device("linear_static", x, "zero_point", zero_point);
  const QParams given{*scale.const_data_ptr<float>(), *zero_point.const_data_ptr<int32_t>()};
  TORCH_CHECK(-128 <= given.zero_point && given.zero_point <= 127,
              "linear_static: expected zero_point in [-128, 127], got ", given.zero_point);
  TORCH_CHECK(!(given.scale <= 0.0f), "linear_static: expected scale to be positive, got ", given.scale);
  return linear_op("linear_static", x, packed_weight, weight_sum, weight_scale, bias, &given, config);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) {
  m.impl("int8_mm", int8_mm_op);
  m.impl("linear_dynamic", linear_dynamic_op);
  m.impl("linear_static", linear_static_op);
}

}  // namespace dynquant::cpu
