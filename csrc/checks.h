// Argument checks shared by the devices: sentences with names and values, the same as reference.py's. What
// passes them is memory-safe to read.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>

#include "config.h"

namespace dynquant {

inline Config check_config(int64_t code) {
  TORCH_CHECK_VALUE(is_valid_config(code), "dynquant: config ", code,
                    " has bits that this version does not know");
  return decode_config(code);
}

inline void check_float(const char* op, const char* name, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, op,
              ": expected ", name, " of dtype float32, bfloat16, float16 or float64, got ", x.dtype());
  TORCH_CHECK(x.dim() >= 1, op, ": expected ", name, " with at least 1 dimension, got 0");
}

// A contiguous 1-D tensor with one element for each output channel.
inline void check_channels(const char* op, const char* name, const at::Tensor& values, at::ScalarType type,
                           int64_t n) {
  TORCH_CHECK(
      values.scalar_type() == type && values.dim() == 1 && values.size(0) == n && values.is_contiguous(), op,
      ": expected ", name, " to be contiguous ", type, " of shape [", n, "], got ", values.scalar_type(),
      " of shape ", values.sizes());
}

// Contiguous int8 of the shape that an [n, k] weight packs to on this device.
inline void check_packed(const char* op, const at::Tensor& packed, at::IntArrayRef shape, int64_t n,
                         int64_t k) {
  TORCH_CHECK(packed.scalar_type() == at::kChar && packed.sizes() == shape && packed.is_contiguous(), op,
              ": expected packed_weight to be contiguous int8 of shape ", shape, " for N = ", n,
              " and K = ", k, ", got ", packed.scalar_type(), " of shape ", packed.sizes());
}

inline void check_qparams(const char* op, int64_t m, const at::Tensor& scale, const at::Tensor& zero_point) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat && zero_point.scalar_type() == at::kInt, op,
              ": expected scale of dtype float32 and zero_point of dtype int32, got ", scale.dtype(), " and ",
              zero_point.dtype());
  TORCH_CHECK(
      scale.dim() == 1 && scale.sizes() == zero_point.sizes() && (scale.size(0) == 1 || scale.size(0) == m),
      op, ": expected scale and zero_point of shape [1] or [", m, "], got ", scale.sizes(), " and ",
      zero_point.sizes());
}

inline void check_device(const char* op, const at::Tensor& x, const char* name, const at::Tensor& other) {
  TORCH_CHECK(other.device() == x.device(), op, ": expected all tensors on one device, got x on ", x.device(),
              " and ", name, " on ", other.device());
}

// Everything that a linear op asks of its tensors but the shape of the packed weight, which is the device's
// own.
inline void check_linear(const char* op, const at::Tensor& x, const at::Tensor& packed_weight,
                         const at::Tensor& weight_sum, const at::Tensor& weight_scale,
                         const std::optional<at::Tensor>& bias) {
  check_float(op, "x", x);
  const int64_t n = weight_scale.numel();
  check_channels(op, "weight_scale", weight_scale, at::kFloat, n);
  check_channels(op, "weight_sum", weight_sum, at::kInt, n);
  check_device(op, x, "packed_weight", packed_weight);
  check_device(op, x, "weight_sum", weight_sum);
  check_device(op, x, "weight_scale", weight_scale);
  if (bias.has_value()) {
    check_channels(op, "bias", *bias, at::kFloat, n);
    check_device(op, x, "bias", *bias);
  }
}

inline at::ScalarType out_dtype(const Config& config, const at::Tensor& x) {
  constexpr std::array<at::ScalarType, 5> types = {at::kFloat, at::kFloat, at::kBFloat16, at::kHalf,
                                                   at::kDouble};
  return config.out_dtype == OutDtype::kInput ? x.scalar_type()
                                              : types[static_cast<size_t>(config.out_dtype)];
}

}  // namespace dynquant
