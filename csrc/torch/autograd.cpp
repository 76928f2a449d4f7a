// Gradients of the linear ops and attention, and autocast of the linear ops, on every device; dynquant/ops/
// has the same formulas for use without the extension. In C++ because every call passes these dispatch keys.

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>

#include "autograd.h"
#include "checks.h"

namespace dynquant {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

using LinearDynamic = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const OptionalTensor&, int64_t);
using LinearStatic = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                            const Tensor&, const Tensor&, int64_t);

const auto& linear_dynamic_op() {
  static const auto op = find_op<LinearDynamic>("dynquant::linear_dynamic");
  return op;
}
const auto& linear_static_op() {
  static const auto op = find_op<LinearStatic>("dynquant::linear_static");
  return op;
}

struct Arguments {
  Tensor x, packed_weight, weight_sum, weight_scale;
  OptionalTensor bias, scale, zero_point;  // scale and zero_point: linear_static alone
  int64_t config;

  Tensor call(int64_t code) const {
    if (!scale.has_value())
      return linear_dynamic_op().call(x, packed_weight, weight_sum, weight_scale, bias, code);
    return linear_static_op().call(x, packed_weight, weight_sum, weight_scale, bias, *scale, *zero_point,
                                   code);
  }
};

Tensor dequantized_weight(const Arguments& args, const Config& config) {
  static const auto unpack = find_op<Tensor(const Tensor&, int64_t, int64_t)>("dynquant::unpack_weight");
  static const auto rotate_back = find_op<Tensor(const Tensor&, int64_t, bool)>("dynquant::rotate_back");
  const Tensor weight = unpack.call(args.packed_weight, args.weight_scale.size(0), args.x.size(-1));
  const Tensor dequantized = weight * args.weight_scale.unsqueeze(1);
  const auto [block, signs] = config.rotation;
  return block > 0 ? rotate_back.call(dequantized, block, signs) : dequantized;
}

// The float activation of an epilogue and its backward, from the table in dynquant/patterns/activations.py.
Tensor activation(const Config& config, const Tensor& y) {
  static const auto op = find_op<Tensor(const Tensor&, int64_t)>("dynquant::activation");
  return op.call(y, static_cast<int64_t>(config.epilogue));
}

Tensor activation_backward(const Config& config, const Tensor& grad, const Tensor& y) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, int64_t)>("dynquant::activation_backward");
  return op.call(grad, y, static_cast<int64_t>(config.epilogue));
}

// Straight-through: grad_x = grad_out @ dequantized weight, grad_bias = the sum of grad_out over the rows.
struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias,
                        const Arguments& args) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, args.packed_weight, args.weight_sum, args.weight_scale,
                            bias.value_or(Tensor()), args.scale.value_or(Tensor()),
                            args.zero_point.value_or(Tensor())});
    ctx->saved_data["config"] = args.config;
    return args.call(args.config);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const Arguments args{
        saved[0],           saved[1],           saved[2],           saved[3],
        optional(saved[4]), optional(saved[5]), optional(saved[6]), ctx->saved_data["config"].toInt()};
    const Config config = check_config(args.config);
    Tensor grad = grads[0].reshape({-1, args.weight_scale.size(0)}).to(at::kFloat);
    if (config.epilogue != Epilogue::kNone) {
      // Where a second derivative is asked for, this call has one too.
      const Tensor y = args.call(plain_fp32(args.config));
      grad = activation_backward(config, grad, y.reshape(grad.sizes()));
    }
    Tensor grad_x, grad_bias;
    if (ctx->needs_input_grad(0)) {
      grad_x = grad.matmul(dequantized_weight(args, config)).to(args.x.scalar_type()).reshape(args.x.sizes());
    }
    if (args.bias.has_value() && ctx->needs_input_grad(1)) {
      grad_bias = grad.sum(0).to(args.bias->scalar_type());
    }
    return {grad_x, grad_bias, Tensor()};
  }
};

bool needs_grad(const Tensor& x, const OptionalTensor& bias) {
  return at::GradMode::is_enabled() && (x.requires_grad() || (bias.has_value() && bias->requires_grad()));
}

// A derivative that a torch::autograd::Function does not have: forward mode, torch.func's transforms.
bool is_transformed(const Tensor& x, const OptionalTensor& bias) {
  const auto has_tangent = [](const Tensor& t) { return t._fw_grad(0).defined(); };
  if (has_tangent(x) || (bias.has_value() && has_tangent(*bias))) return true;
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) &&
         needs_grad(x, bias);
}

// The op on what has no derivative, plus terms that are 0 and have it: torch's own ops, which every transform
// knows. The same stands in dynquant/ops/linear.py.
Tensor linear_by_torch_ops(const Arguments& args) {
  const Config config = check_config(args.config);
  Arguments fixed = args;
  fixed.x = args.x.detach();
  if (args.bias.has_value()) fixed.bias = args.bias->detach();
  const Tensor out = fixed.call(args.config);
  Tensor change = (args.x - fixed.x).to(at::kFloat).matmul(dequantized_weight(fixed, config).t());
  // An infinite bias rules an output out; inf - inf would make it NaN.
  if (args.bias.has_value()) change = change + (*args.bias - *fixed.bias).to(at::kFloat).nan_to_num(0.0);
  if (config.epilogue != Epilogue::kNone) {
    const Tensor y = fixed.call(plain_fp32(args.config)) + change;
    const Tensor activated = activation(config, y);
    change = activated - activated.detach();
  }
  return out + change.to(out.scalar_type());
}

Tensor linear_dynamic_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& packed_weight,
                               const Tensor& weight_sum, const Tensor& weight_scale,
                               const OptionalTensor& bias, int64_t config) {
  if (is_transformed(x, bias) || needs_grad(x, bias)) {
    const Arguments args{x,    packed_weight, weight_sum,   weight_scale,
                         bias, std::nullopt,  std::nullopt, config};
    return is_transformed(x, bias) ? linear_by_torch_ops(args) : LinearFunction::apply(x, bias, args);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return linear_dynamic_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, packed_weight,
                                        weight_sum, weight_scale, bias, config);
}

Tensor linear_static_autograd(c10::DispatchKeySet keys, const Tensor& x, const Tensor& packed_weight,
                              const Tensor& weight_sum, const Tensor& weight_scale,
                              const OptionalTensor& bias, const Tensor& scale, const Tensor& zero_point,
                              int64_t config) {
  if (is_transformed(x, bias) || needs_grad(x, bias)) {
    const Arguments args{x, packed_weight, weight_sum, weight_scale, bias, scale, zero_point, config};
    return is_transformed(x, bias) ? linear_by_torch_ops(args) : LinearFunction::apply(x, bias, args);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return linear_static_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, packed_weight, weight_sum,
                                       weight_scale, bias, scale, zero_point, config);
}

// ---- attention ----

using Attention = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool,
                         std::optional<double>);

const auto& attention_op() {
  static const auto op = find_op<Attention>("dynquant::attention");
  return op;
}

bool has_derivative(const OptionalTensor& x) {
  if (!x.has_value()) return false;
  return (at::GradMode::is_enabled() && x->requires_grad()) || x->_fw_grad(0).defined();
}

// torch's attention, which takes a mask or is_causal and a mask of q's dtype.
Tensor sdpa(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor mask, bool is_causal,
            std::optional<double> scale) {
  if (mask.has_value() && is_causal) {
    const Tensor seen = at::ones({q.size(2), k.size(2)}, q.options().dtype(at::kBool)).tril();
    mask = mask->scalar_type() == at::kBool
               ? at::logical_and(*mask, seen)
               : at::where(seen, *mask, -std::numeric_limits<double>::infinity());
    is_causal = false;
  }
  if (mask.has_value() && mask->scalar_type() != at::kBool) mask = mask->to(q.scalar_type());
  return at::scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale,
                                          /*enable_gqa=*/q.size(1) != k.size(1));
}

// The op, plus torch's own attention as a term that is 0 and has its derivatives. The same stands in
// dynquant/ops/autograd.py.
Tensor attention_autograd(c10::DispatchKeySet keys, const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptionalTensor& mask, bool is_causal, std::optional<double> scale) {
  if (!has_derivative(q) && !has_derivative(k) && !has_derivative(v) && !has_derivative(mask)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return attention_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, q, k, v, mask, is_causal,
                                     scale);
  }
  const OptionalTensor fixed_mask = mask.has_value() ? OptionalTensor(mask->detach()) : std::nullopt;
  const Tensor out = attention_op().call(q.detach(), k.detach(), v.detach(), fixed_mask, is_causal, scale);
  const Tensor exact = sdpa(q, k, v, mask, is_causal, scale);
  return out + (exact - exact.detach());
}

// ---- the other ops ----

// Ops without gradient run below autograd, and their results require none.
void below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

bool requires_grad(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().requires_grad();
  if (!value.isList()) return false;
  for (const c10::IValue& element : value.toListRef()) {
    if (requires_grad(element)) return true;
  }
  return false;
}

// Ops of whole blocks: their callers have the parts, which have derivatives.
void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
      TORCH_CHECK_NOT_IMPLEMENTED(!requires_grad(argument), op.schema().name().substr(10),
                                  ": expected inputs that require no gradient, since this op has no "
                                  "derivative; call it under torch.no_grad()");
    }
  }
  below_autograd(op, keys, stack);
}

// Under autocast the output has the autocast dtype; the input keeps its dtype. fp64 stays as it is, as in
// torch.
int64_t autocast_config(c10::DeviceType device, const Tensor& x, int64_t code) {
  const Config config = check_config(code);
  if (config.out_dtype != OutDtype::kInput || x.scalar_type() == at::kDouble) return code;
  const at::ScalarType type = at::autocast::get_autocast_dtype(device);
  const OutDtype out = type == at::kBFloat16 ? OutDtype::kBFloat16
                       : type == at::kHalf   ? OutDtype::kFloat16
                                             : OutDtype::kFloat32;
  return code | static_cast<int64_t>(out) << kOutDtypeShift;
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_dynamic_autocast(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                               const Tensor& weight_scale, const OptionalTensor& bias, int64_t config) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return linear_dynamic_op().call(x, packed_weight, weight_sum, weight_scale, bias,
                                  autocast_config(device, x, config));
}

template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_static_autocast(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                              const Tensor& weight_scale, const OptionalTensor& bias, const Tensor& scale,
                              const Tensor& zero_point, int64_t config) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  return linear_static_op().call(x, packed_weight, weight_sum, weight_scale, bias, scale, zero_point,
                                 autocast_config(device, x, config));
}

}  // namespace

void run_below_autograd(const std::string& name, bool refuses_gradients) {
  static torch::Library library(torch::Library::IMPL, "dynquant", c10::DispatchKey::Autograd, __FILE__,
                                __LINE__);
  library.impl(name.c_str(), refuses_gradients
                                 ? torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>()
                                 : torch::CppFunction::makeFromBoxedFunction<&below_autograd>());
}

TORCH_LIBRARY_IMPL(dynquant, Autograd, m) {
  m.impl("linear_dynamic", linear_dynamic_autograd);
  m.impl("linear_static", linear_static_autograd);
  m.impl("attention", attention_autograd);
}

TORCH_LIBRARY_IMPL(dynquant, AutocastCPU, m) {
  m.impl("linear_dynamic", linear_dynamic_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
  m.impl("linear_static", linear_static_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}

TORCH_LIBRARY_IMPL(dynquant, AutocastCUDA, m) {
  m.impl("linear_dynamic", linear_dynamic_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
  m.impl("linear_static", linear_static_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}

}  // namespace dynquant
