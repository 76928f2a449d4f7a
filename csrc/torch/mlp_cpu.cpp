// The CPU ops of layers with residual and norm, and of MLPs: check, allocate, call.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "checked_layer.h"
#include "checked_norm.h"
#include "checks.h"
#include "cpu/mlp.h"
#include "cpu_call.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

// A residual as rows of the output's shape.
struct CheckedResidual {
  Rows rows{};
  Tensor owner;

  CheckedResidual(const char* op, const std::optional<Tensor>& residual, const Tensor& x, int64_t n) {
    if (!residual.has_value()) return;
    check_float(op, "residual", *residual);
    c10::SmallVector<int64_t, 5> expected(x.sizes().begin(), x.sizes().end());
    expected.back() = n;
    TORCH_CHECK(residual->sizes() == at::IntArrayRef(expected), op, ": expected residual of shape ",
                at::IntArrayRef(expected), ", got ", residual->sizes());
    check_device(op, x, "residual", *residual);
    rows = rows_of(*residual, kNoRotation, owner);
  }

  const Rows* get() const { return owner.defined() ? &rows : nullptr; }
};

// Allocates the output and calls. The last layer's config gives its dtype.
Tensor run(Mlp args, const Tensor& x, const CheckedLayer& last) {
  Tensor x_owner;
  args.x = rows_of(x, kNoRotation, x_owner);
  const int64_t n = last.packed.weight.n;
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  const at::ScalarType wanted = last.out_type;
  const at::ScalarType computed = wanted == at::kDouble ? at::kFloat : wanted;
  Tensor out = at::empty(shape, x.options().dtype(computed));
  if (args.x.m > 0 && n > 0) {
    args.out = Destination{out.mutable_data_ptr(), n, dtype_of(computed), Epilogue::kNone};
    const MlpPlan plan = plan_mlp(args, torch_threads());
    Scratch scratch(plan.workspace_bytes);
    mlp(args, plan, scratch.data(), torch_threads());
  }
  return wanted == computed ? out : out.to(wanted);
}

Tensor linear_norm_op(const Tensor& x, const Tensors& layer, int64_t config,
                      const std::optional<Tensor>& residual, const Tensors& norm_in, const Tensors& norm_out,
                      double eps, int64_t norm) {
  const char* op = "linear_norm";
  check_float(op, "x", x);
  const CheckedLayer only(op, "layer", layer, x, x.size(-1), config);
  const int64_t n = only.packed.weight.n;
  const CheckedNorm before(op, "norm_in", norm_in, x, x.size(-1), eps, norm);
  const CheckedNorm after(op, "norm_out", norm_out, x, n, eps, norm);
  const CheckedResidual added(op, residual, x, n);
  Mlp args{};
  args.norm_in = before.norm;
  args.norm_out = after.norm;
  args.layer = &only.packed;
  args.residual = added.get();
  return run(args, x, only);
}

// The layers of an MLP whose input has k elements.
struct CheckedMlp {
  CheckedLayer up;
  std::optional<CheckedLayer> gate;
  CheckedLayer down;

  CheckedMlp(const char* op, const Tensor& x, int64_t k, const Tensors& gate_tensors,
             const Tensors& up_tensors, const Tensors& down_tensors, int64_t gate_config, int64_t up_config,
             int64_t down_config)
      : up(op, "up", up_tensors, x, k, up_config),
        gate(gate_of(op, x, k, gate_tensors, gate_config, up.packed)),
        down(op, "down", down_tensors, x, channels_of(up_tensors), down_config) {}

  void put_into(Mlp& args) const {
    args.up = &up.packed;
    args.gate = gate.has_value() ? &gate->packed : nullptr;
    args.down = &down.packed;
  }

 private:
  static std::optional<CheckedLayer> gate_of(const char* op, const Tensor& x, int64_t k,
                                             const Tensors& tensors, int64_t config, const PackedLayer& up) {
    if (tensors.empty()) return std::nullopt;
    std::optional<CheckedLayer> gate(std::in_place, op, "gate", tensors, x, k, config);
    TORCH_CHECK(gate->packed.weight.n == up.weight.n, op, ": expected gate to have ", up.weight.n,
                " channels, as up has, got ", gate->packed.weight.n);
    const Rotation one = gate->packed.rotation, other = up.rotation;
    TORCH_CHECK(one == other, op, ": expected gate and up with one rotation, got block ", one.block,
                one.signs ? " with" : " without", " signs and block ", other.block,
                other.signs ? " with" : " without", " signs");
    return gate;
  }
};

Tensor mlp_op(const Tensor& x, const Tensors& gate, const Tensors& up, const Tensors& down,
              at::IntArrayRef configs, const std::optional<Tensor>& residual, const Tensors& norm_in,
              const Tensors& norm_out, double eps, int64_t norm) {
  const char* op = "mlp";
  check_float(op, "x", x);
  TORCH_CHECK(configs.size() == 3, op, ": expected a config of gate, up and down, got ", configs.size(),
              " configs");
  const CheckedMlp layers(op, x, x.size(-1), gate, up, down, configs[0], configs[1], configs[2]);
  const int64_t n = layers.down.packed.weight.n;
  const CheckedNorm before(op, "norm_in", norm_in, x, x.size(-1), eps, norm);
  const CheckedNorm after(op, "norm_out", norm_out, x, n, eps, norm);
  const CheckedResidual added(op, residual, x, n);
  Mlp args{};
  args.norm_in = before.norm;
  args.norm_out = after.norm;
  layers.put_into(args);
  args.residual = added.get();
  return run(args, x, layers.down);
}

Tensor linear_mlp_op(const Tensor& x, const Tensors& layer, const Tensors& gate, const Tensors& up,
                     const Tensors& down, at::IntArrayRef configs, const Tensor& residual,
                     const Tensors& first_norm, const Tensors& second_norm, double eps, int64_t norm,
                     bool pre_norm) {
  const char* op = "linear_mlp";
  check_float(op, "x", x);
  TORCH_CHECK(configs.size() == 4, op, ": expected a config of layer, gate, up and down, got ",
              configs.size(), " configs");
  const CheckedLayer first(op, "layer", layer, x, x.size(-1), configs[0]);
  const int64_t n = first.packed.weight.n;
  const CheckedMlp layers(op, x, n, gate, up, down, configs[1], configs[2], configs[3]);
  TORCH_CHECK(layers.down.packed.weight.n == n, op, ": expected down to have ", n,
              " channels, as layer has, got ", layers.down.packed.weight.n);
  const CheckedNorm before(op, "first_norm", first_norm, x, n, eps, norm);
  const CheckedNorm after(op, "second_norm", second_norm, x, n, eps, norm);
  TORCH_CHECK(!pre_norm || second_norm.empty(), op, ": expected no second_norm with pre_norm");
  const CheckedResidual added(op, residual, x, n);
  Mlp args{};
  args.norm_in = before.norm;
  args.norm_out = after.norm;
  args.layer = &first.packed;
  layers.put_into(args);
  args.residual = added.get();
  args.pre_norm = pre_norm;
  return run(args, x, layers.down);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) {
  m.impl("linear_norm", linear_norm_op);
  m.impl("mlp", mlp_op);
  m.impl("linear_mlp", linear_mlp_op);
}

}  // namespace dynquant::cpu
