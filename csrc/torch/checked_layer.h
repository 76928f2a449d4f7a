// A layer among the arguments of a CPU op: a list of packed_weight, weight_sum, weight_scale and bias (or
// None).
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "checks.h"
#include "cpu/linear.h"
#include "cpu/pack.h"

namespace dynquant::cpu {

using Tensors = c10::List<std::optional<at::Tensor>>;

inline int64_t channels_of(const Tensors& layer) {
  const std::optional<at::Tensor> scale = layer.size() == 4 ? layer.get(2) : std::nullopt;
  return scale.has_value() ? scale->numel() : 0;
}

// One of the layers of a call; an instance keeps its tensors alive. Activations are per_token unless
// `takes_per_tensor`.
struct CheckedLayer {
  PackedLayer packed;
  at::ScalarType out_type;
  std::optional<at::Tensor> packed_weight, weight_sum, weight_scale, bias;
  at::Tensor bias_owner;

  CheckedLayer(const char* op_name, const char* role, const Tensors& tensors, const at::Tensor& x, int64_t k,
               int64_t code, bool takes_per_tensor = false) {
    check_float(op_name, "x", x);
    const std::string named = std::string(op_name) + ", " + role;
    const char* op = named.c_str();
    TORCH_CHECK(tensors.size() == 4, op,
                ": expected packed_weight, weight_sum, weight_scale and bias (or None), got ", tensors.size(),
                " tensors");
    packed_weight = tensors.get(0);
    weight_sum = tensors.get(1);
    weight_scale = tensors.get(2);
    bias = tensors.get(3);
    TORCH_CHECK(packed_weight.has_value() && weight_sum.has_value() && weight_scale.has_value(), op,
                ": expected packed_weight, weight_sum and weight_scale, got None");
    const Config config = check_config(code);
    TORCH_CHECK(takes_per_tensor || !config.per_tensor, op,
                ": expected per_token activations in config, got per_tensor");
    check_linear(op, x, *packed_weight, *weight_sum, *weight_scale, bias);
    const int64_t n = weight_scale->numel();
    const auto shape = packed_shape(n, k);
    check_packed(op, *packed_weight, shape, n, k);
    check_k(op, k, code);
    if (config.rotation.block > 0) check_rotation(op, k, config.rotation.block);
    out_type = out_dtype(config, x);
    packed = {
        Weight{packed_weight->const_data_ptr<int8_t>(), n, k, shape[2], weight_sum->const_data_ptr<int32_t>(),
               weight_scale->const_data_ptr<float>(), dynquant::in_fp32(bias, bias_owner), config.full_range},
        config.epilogue, config.rotation, config.per_tensor};
  }
};

}  // namespace dynquant::cpu
