// The CPU op of a recurrent layer: check, allocate, call.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "checked_layer.h"
#include "checks.h"
#include "cpu/rnn.h"
#include "cpu_call.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

struct Cell {
  RnnCell kind;
  const char* name;
  size_t states;
};

constexpr std::array<Cell, 4> kCells = {{{RnnCell::kLstm, "lstm", 2},
                                         {RnnCell::kGru, "gru", 1},
                                         {RnnCell::kTanh, "rnn_tanh", 1},
                                         {RnnCell::kRelu, "rnn_relu", 1}}};  // dynquant.config.CELLS

void check_state(const char* name, const Tensor& x, const Tensor& values, int64_t batch, int64_t size) {
  check_float("rnn", name, values);
  TORCH_CHECK(values.dim() == 2 && values.size(0) == batch && values.size(1) == size, "rnn: expected ", name,
              " of shape [", batch, ", ", size, "], got ", values.sizes());
  check_device("rnn", x, name, values);
}

std::string listed(const int64_t* sizes, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < std::min<int64_t>(count, 8); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + (count > 8 ? ", ...]" : "]");
}

void check_batch_sizes(const Tensor& x, const int64_t* sizes, int64_t steps, int64_t batch) {
  int64_t sum = 0, last = batch;
  bool falls = steps == 0 || sizes[0] == batch;
  for (int64_t i = 0; i < steps; ++i) {
    falls = falls && 0 < sizes[i] && sizes[i] <= last;
    last = sizes[i];
    if (falls) sum += last;
  }
  TORCH_CHECK(falls, "rnn: expected batch_sizes to fall from B (", batch, ") and to be positive, got ",
              listed(sizes, steps));
  TORCH_CHECK(sum == x.size(0), "rnn: expected batch_sizes to add up to x.shape[0] (", x.size(0), "), got ",
              sum);
}

// The layer of the input if its weight is float: a list of the weight [N, K] and the bias (or None).
struct CheckedFloatLayer {
  FloatLayer layer;
  at::ScalarType out_type;
  std::optional<Tensor> weight, bias;
  Tensor weight_owner, bias_owner;

  static bool is_one(const Tensors& tensors) { return tensors.size() == 2; }

  CheckedFloatLayer(const Tensors& tensors, const Tensor& x, int64_t code)
      : weight(tensors.get(0)), bias(tensors.get(1)) {
    constexpr const char* op = "rnn, input_layer";
    const Config config = check_config(code);
    TORCH_CHECK(weight.has_value(), op, ": expected a float weight, got None");
    check_float(op, "weight", *weight);
    TORCH_CHECK(weight->dim() == 2 && weight->size(1) == x.size(-1), op, ": expected weight of shape [N, ",
                x.size(-1), "], got ", weight->sizes());
    check_device(op, x, "weight", *weight);
    const int64_t n = weight->size(0);
    if (bias.has_value()) {
      check_bias(op, *bias, n);
      check_device(op, x, "bias", *bias);
    }
    TORCH_CHECK(config.rotation.block == 0, op, ": expected no rotation in config with a float weight, got ",
                "block ", config.rotation.block);
    check_k(op, x.size(-1), code);
    out_type = out_dtype(config, x);
    layer = {rows_of(*weight, kNoRotation, weight_owner), dynquant::in_fp32(bias, bias_owner)};
  }
};

// The layers of a call, which fit each other.
struct CheckedLayers {
  int64_t gated, gates, hidden, out;
  std::optional<CheckedLayer> input_layer;
  std::optional<CheckedFloatLayer> float_input;
  std::optional<CheckedLayer> hidden_layer, projection;

  CheckedLayers(const Tensor& x, RnnCell cell, const Tensors& input_tensors, const Tensors& hidden_tensors,
                const Tensors& projection_tensors, at::IntArrayRef configs)
      : gated(channels_of(hidden_tensors)),
        gates(gates_of(cell)),
        hidden(gated / gates),
        out(projection_tensors.empty() ? hidden : channels_of(projection_tensors)) {
    if (CheckedFloatLayer::is_one(input_tensors)) {
      float_input.emplace(input_tensors, x, configs[0]);
    } else {
      input_layer.emplace("rnn", "input_layer", input_tensors, x, x.size(-1), configs[0], true);
    }
    hidden_layer.emplace("rnn", "hidden_layer", hidden_tensors, x, out, configs[1], true);
    const int64_t channels = float_input ? float_input->layer.weight.m : input_layer->packed.weight.n;
    TORCH_CHECK(gated % gates == 0 && channels == gated, "rnn: expected input_layer and hidden_layer with ",
                gates, " gates of one size, got ", channels, " and ", gated, " channels");
    if (!projection_tensors.empty()) {
      projection.emplace("rnn", "projection", projection_tensors, x, hidden, configs[2], true);
    }
    const bool plain = std::all_of(configs.begin(), configs.end(), [](int64_t code) {
      return check_config(code).epilogue == Epilogue::kNone;
    });
    TORCH_CHECK(plain, "rnn: expected no epilogue in the configs, got ", configs);
  }

  at::ScalarType out_type() const { return float_input ? float_input->out_type : input_layer->out_type; }
};

// fp32, contiguous, for the kernels to write to.
Tensor state_in_fp32(const Tensor& values) {
  if (values.scalar_type() == at::kDouble) return cast(values, at::kFloat);
  Tensor copy = at::empty(values.sizes(), values.options().dtype(at::kFloat));
  return copy.copy_(values);
}

std::vector<Tensor> rnn_op(const Tensor& x, at::TensorList state, const Tensors& input_layer,
                           const Tensors& hidden_layer, const std::optional<Tensors>& given_projection,
                           at::IntArrayRef configs, int64_t cell, const std::optional<Tensor>& batch_sizes,
                           bool reverse) {
  TORCH_CHECK(0 <= cell && cell < static_cast<int64_t>(kCells.size()), "rnn: expected cell in [0, ",
              kCells.size() - 1, "], got ", cell);
  const Cell& kind = kCells[static_cast<size_t>(cell)];
  // AOTInductor passes an empty list as None.
  const Tensors projection = given_projection.value_or(Tensors());
  TORCH_CHECK(configs.size() == 3, "rnn: expected a config of each layer and the projection, got ",
              configs.size(), " configs");
  check_float("rnn", "x", x);
  if (batch_sizes.has_value()) {
    TORCH_CHECK(
        batch_sizes->scalar_type() == at::kLong && batch_sizes->dim() == 1 && batch_sizes->device().is_cpu(),
        "rnn: expected batch_sizes to be int64 of 1 dimension on the CPU, got ",
        dtype_name(batch_sizes->scalar_type()), " of shape ", batch_sizes->sizes(), " on ",
        batch_sizes->device());
    check_memory("rnn", "batch_sizes", *batch_sizes);
    TORCH_CHECK(x.dim() == 2, "rnn: expected packed x with 2 dimensions [sum of batch_sizes, K], got ",
                x.dim());
  } else {
    TORCH_CHECK(x.dim() == 3, "rnn: expected x with 3 dimensions [T, B, K], got ", x.dim());
  }
  TORCH_CHECK(projection.empty() || kind.kind == RnnCell::kLstm,
              "rnn: expected no projection of a cell of kind ", kind.name);
  TORCH_CHECK(state.size() == kind.states, "rnn: expected ", kind.states,
              kind.states > 1 ? " tensors of state for " : " tensor of state for ", kind.name, ", got ",
              state.size());
  const CheckedLayers layers(x, kind.kind, input_layer, hidden_layer, projection, configs);
  const int64_t batch = !batch_sizes.has_value() ? x.size(1) : state[0].dim() > 0 ? state[0].size(0) : 0;
  check_state("h", x, state[0], batch, layers.out);
  if (kind.states > 1) check_state("c", x, state[1], batch, layers.hidden);

  Tensor sizes;
  if (batch_sizes.has_value()) {
    sizes = batch_sizes->contiguous();
    check_batch_sizes(x, sizes.const_data_ptr<int64_t>(), sizes.numel(), batch);
  }

  const at::ScalarType wanted = layers.out_type();
  const at::ScalarType computed = wanted == at::kDouble ? at::kFloat : wanted;
  c10::SmallVector<int64_t, 3> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = layers.out;
  std::vector<Tensor> results = {at::empty(shape, x.options().dtype(computed))};
  for (const Tensor& values : state) results.push_back(state_in_fp32(values));
  Tensor owner;
  const Rows rows = rows_of(x, kNoRotation, owner);
  if (rows.m > 0 && batch > 0) {
    const Rnn args{
        kind.kind,
        rows,
        layers.input_layer ? &layers.input_layer->packed : nullptr,
        layers.float_input ? &layers.float_input->layer : nullptr,
        layers.hidden_layer->packed,
        layers.projection.has_value() ? &layers.projection->packed : nullptr,
        sizes.defined() ? sizes.numel() : x.size(0),
        batch,
        sizes.defined() ? sizes.const_data_ptr<int64_t>() : nullptr,
        reverse,
        results[1].mutable_data_ptr<float>(),
        kind.states > 1 ? results[2].mutable_data_ptr<float>() : nullptr,
        Destination{results[0].mutable_data_ptr(), layers.out, dtype_of(computed), Epilogue::kNone}};
    const RnnPlan plan = plan_rnn(args, torch_threads());
    Scratch scratch(plan.workspace_bytes);
    rnn(args, plan, scratch.data(), torch_threads());
  }
  for (Tensor& result : results) {
    if (result.scalar_type() != wanted)
      result = wanted == at::kDouble ? cast(result, wanted) : result.to(wanted);
  }
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) { m.impl("rnn", rnn_op); }

}  // namespace dynquant::cpu
