// A norm among the arguments of a CPU op: a list of weight and bias (or None), empty for no norm.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "checked_layer.h"
#include "checks.h"
#include "cpu/kernel_table.h"

namespace dynquant::cpu {

inline constexpr std::array<NormKind, 2> kNorms = {NormKind::kLayer,
                                                   NormKind::kRms};  // dynquant.config.NORMS

// An instance keeps its tensors alive. `x`, of the device, is named `x_name` in errors.
struct CheckedNorm {
  Norm norm{NormKind::kNone, nullptr, nullptr, 0.0f};
  at::Tensor weight, bias;

  CheckedNorm(const char* op, const char* name, const Tensors& parameters, const at::Tensor& x, int64_t size,
              double eps, int64_t kind, const char* x_name = "x") {
    TORCH_CHECK(0 <= kind && kind < static_cast<int64_t>(kNorms.size()), op, ": expected norm in [0, ",
                kNorms.size() - 1, "], got ", kind);
    if (parameters.empty()) return;
    TORCH_CHECK(parameters.size() == 2, op, ": expected ", name, " to be weight and bias, got ",
                parameters.size(), " tensors");
    TORCH_CHECK(size > 0, op, ": expected ", name, " over at least 1 element, got ", size);
    norm.kind = kNorms[static_cast<size_t>(kind)];
    TORCH_CHECK(norm.kind != NormKind::kRms || !parameters.get(1).has_value(), op, ": expected no bias in ",
                name, ", since rms_norm has none");
    norm.eps = static_cast<float>(eps);
    norm.weight = in_fp32(op, std::string(name) + "'s weight", parameters.get(0), x, size, weight, x_name);
    norm.bias = in_fp32(op, std::string(name) + "'s bias", parameters.get(1), x, size, bias, x_name);
  }

 private:
  static const float* in_fp32(const char* op, const std::string& name,
                              const std::optional<at::Tensor>& values, const at::Tensor& x, int64_t size,
                              at::Tensor& owner, const char* x_name) {
    if (!values.has_value()) return nullptr;
    check_float(op, name.c_str(), *values);
    TORCH_CHECK(values->dim() == 1 && values->size(0) == size, op, ": expected ", name, " of shape [", size,
                "], got ", values->sizes());
    check_device(op, x, name.c_str(), *values, x_name);
    owner = *values;
    return dynquant::in_fp32(values, owner);
  }
};

}  // namespace dynquant::cpu
