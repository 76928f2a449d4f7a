// Argument checks shared by the devices, with the sentences of dynquant/reference. Arguments that pass them
// are memory-safe to read.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>

#include "config.h"
#include "types.h"

namespace dynquant {

// The Python name of a dtype, e.g. "torch.int8"; TypeMeta and ScalarType print C++ names.
inline std::string dtype_name(at::ScalarType type) {
  return "torch." + std::string(c10::getDtypeNames(type).first);
}

// The number of rows of x: the product of its leading dimensions.
inline int64_t leading_size(const at::Tensor& x) {
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) m *= x.size(d);
  return m;
}

inline Dtype dtype_of(at::ScalarType type) {
  return type == at::kFloat ? Dtype::kFloat32 : type == at::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat16;
}

inline Config check_config(int64_t code) {
  TORCH_CHECK_VALUE(is_valid_config(code), "dynquant: config ", code,
                    " has bits that this version does not know");
  return decode_config(code);
}

// Memory may be taken from a tensor (untyped_storage().resize_(0)): reading it would end the process.
inline void check_memory(const char* op, const char* name, const at::Tensor& values) {
  const c10::TensorImpl& tensor = *values.unsafeGetTensorImpl();
  if (tensor.numel() == 0 || !tensor.has_storage()) return;
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  int64_t elements = tensor.storage_offset() + 1;
  for (size_t d = 0; d < sizes.size(); ++d) elements += (sizes[d] - 1) * strides[d];
  const size_t bytes = tensor.unsafe_storage().nbytes();
  TORCH_CHECK(static_cast<size_t>(elements) * tensor.itemsize() <= bytes, op, ": expected ", name,
              " to have its memory, got a storage of ", bytes, " bytes for ", sizes, " elements of ",
              dtype_name(values.scalar_type()));
}

inline void check_float(const char* op, const char* name, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, op,
              ": expected ", name, " of dtype float32, bfloat16, float16 or float64, got ", dtype_name(type));
  TORCH_CHECK(x.dim() >= 1, op, ": expected ", name, " with at least 1 dimension, got 0");
  check_memory(op, name, x);
}

// A contiguous 1-D tensor with one element per output channel.
inline void check_channels(const char* op, const char* name, const at::Tensor& values, at::ScalarType type,
                           int64_t n) {
  TORCH_CHECK(
      values.scalar_type() == type && values.dim() == 1 && values.size(0) == n && values.is_contiguous(), op,
      ": expected ", name, " to be contiguous ", dtype_name(type), " of shape [", n, "], got ",
      dtype_name(values.scalar_type()), " of shape ", values.sizes());
  check_memory(op, name, values);
}

// A bias has any float dtype and any stride: in_fp32 makes what the kernels read.
inline void check_bias(const char* op, const at::Tensor& bias, int64_t n) {
  const auto type = bias.scalar_type();
  const bool is_float =
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
  TORCH_CHECK(is_float && bias.dim() == 1 && bias.size(0) == n, op,
              ": expected bias of dtype float32, bfloat16, float16 or float64 and shape [", n, "], got ",
              dtype_name(type), " of shape ", bias.sizes());
  check_memory(op, "bias", bias);
}

// Contiguous fp32 values of a bias, null without one; `owner` keeps the copy alive where one was needed.
inline const float* in_fp32(const std::optional<at::Tensor>& bias, at::Tensor& owner) {
  if (!bias.has_value()) return nullptr;
  if (bias->scalar_type() == at::kFloat && bias->is_contiguous()) return bias->const_data_ptr<float>();
  owner = bias->to(at::kFloat).contiguous();
  return owner.const_data_ptr<float>();
}

// Contiguous int8 in the packed shape of an [n, k] weight on this device.
inline void check_packed(const char* op, const at::Tensor& packed, at::IntArrayRef shape, int64_t n,
                         int64_t k) {
  TORCH_CHECK(packed.scalar_type() == at::kChar && packed.sizes() == shape && packed.is_contiguous(), op,
              ": expected packed_weight to be contiguous int8 of shape ", shape, " for N = ", n,
              " and K = ", k, ", got ", dtype_name(packed.scalar_type()), " of shape ", packed.sizes());
  check_memory(op, "packed_weight", packed);
}

// K is known modulo 16 from config, and rounded up from the packed weight (check_packed).
inline void check_k(const char* op, int64_t k, int64_t code) {
  const int64_t expected = k_modulo_16(code);
  TORCH_CHECK(expected < 0 || k % kKModulus == expected, op, ": expected x.shape[-1] to be ", expected,
              " modulo ", kKModulus, ", as config says, got ", k);
}

inline void check_qparams(const char* op, int64_t m, const at::Tensor& scale, const at::Tensor& zero_point) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat && zero_point.scalar_type() == at::kInt, op,
              ": expected scale of dtype float32 and zero_point of dtype int32, got ",
              dtype_name(scale.scalar_type()), " and ", dtype_name(zero_point.scalar_type()));
  TORCH_CHECK(
      scale.dim() == 1 && scale.sizes() == zero_point.sizes() && (scale.size(0) == 1 || scale.size(0) == m),
      op, ": expected scale and zero_point of shape [1] or [", m, "], got ", scale.sizes(), " and ",
      zero_point.sizes());
  check_memory(op, "scale", scale);
  check_memory(op, "zero_point", zero_point);
}

inline void check_device(const char* op, const at::Tensor& x, const char* name, const at::Tensor& other,
                         const char* name_of_x = "x") {
  TORCH_CHECK(other.device() == x.device(), op, ": expected all tensors on one device, got ", name_of_x,
              " on ", x.device(), " and ", name, " on ", other.device());
}

inline void check_ranges(const char* op, const at::Tensor& lo, const at::Tensor& hi) {
  TORCH_CHECK(lo.scalar_type() == at::kFloat && hi.scalar_type() == at::kFloat && lo.sizes() == hi.sizes(),
              op, ": expected lo and hi of dtype float32 and one shape, got ", dtype_name(lo.scalar_type()),
              " of shape ", lo.sizes(), " and ", dtype_name(hi.scalar_type()), " of shape ", hi.sizes());
  check_device(op, lo, "hi", hi, "lo");
  check_memory(op, "lo", lo);
  check_memory(op, "hi", hi);
}

inline void check_rotation(const char* op, int64_t k, int64_t block) {
  TORCH_CHECK(block >= 1 && block <= 128 && (block & (block - 1)) == 0 && k % block == 0, op,
              ": expected block to be a power of two up to 128 that divides K (", k, "), got ", block);
}

// All requirements of int8_mm except the shape of the packed weight.
inline void check_int8_mm(const at::Tensor& q, const at::Tensor& packed_weight,
                          const at::Tensor& weight_sum) {
  constexpr int64_t kMaxK = INT32_MAX / (128 * 128);
  TORCH_CHECK(q.scalar_type() == at::kChar && q.dim() == 2,
              "int8_mm: expected q to be int8 with 2 dimensions [M, K], got ", dtype_name(q.scalar_type()),
              " with ", q.dim());
  check_channels("int8_mm", "weight_sum", weight_sum, at::kInt, weight_sum.numel());
  TORCH_CHECK(q.size(1) <= kMaxK, "int8_mm: expected K <= ", kMaxK, " so that int32 is exact, got ",
              q.size(1));
  check_device("int8_mm", q, "packed_weight", packed_weight, "q");
  check_device("int8_mm", q, "weight_sum", weight_sum, "q");
  check_memory("int8_mm", "q", q);
}

// All requirements of a linear op except the shape of the packed weight, which depends on the device.
inline void check_linear(const char* op, const at::Tensor& x, const at::Tensor& packed_weight,
                         const at::Tensor& weight_sum, const at::Tensor& weight_scale,
                         const std::optional<at::Tensor>& bias) {
  check_float(op, "x", x);
  const int64_t n = weight_scale.numel();
  check_channels(op, "weight_scale", weight_scale, at::kFloat, n);
  check_channels(op, "weight_sum", weight_sum, at::kInt, n);
  if (bias.has_value()) check_bias(op, *bias, n);
  check_device(op, x, "packed_weight", packed_weight);
  check_device(op, x, "weight_sum", weight_sum);
  check_device(op, x, "weight_scale", weight_scale);
  if (bias.has_value()) check_device(op, x, "bias", *bias);
}

inline at::ScalarType out_dtype(const Config& config, const at::Tensor& x) {
  constexpr std::array<at::ScalarType, 5> types = {at::kFloat, at::kFloat, at::kBFloat16, at::kHalf,
                                                   at::kDouble};
  return config.out_dtype == OutDtype::kInput ? x.scalar_type()
                                              : types[static_cast<size_t>(config.out_dtype)];
}

// All requirements of attention.
inline void check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::optional<at::Tensor>& mask, std::optional<double> scale) {
  constexpr int64_t kMaxHeadSize = INT32_MAX / (255 * 127);
  const auto check_heads = [&](const char* name, const at::Tensor& x) {
    check_float("attention", name, x);
    TORCH_CHECK(x.dim() == 4, "attention: expected ", name, " with 4 dimensions [B, H, S, D], got ", x.dim());
    check_device("attention", q, name, x, "q");
  };
  check_heads("q", q);
  check_heads("k", k);
  check_heads("v", v);
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && k.scalar_type() == v.scalar_type(),
              "attention: expected q, k and v of one dtype, got ", dtype_name(q.scalar_type()), ", ",
              dtype_name(k.scalar_type()), " and ", dtype_name(v.scalar_type()));
  TORCH_CHECK(k.sizes() == v.sizes(), "attention: expected k and v of one shape, got ", k.sizes(), " and ",
              v.sizes());
  TORCH_CHECK(q.size(0) == k.size(0), "attention: expected k and v of q's batch size (", q.size(0), "), got ",
              k.size(0));
  TORCH_CHECK(q.size(3) == k.size(3), "attention: expected k and v of q's head size (", q.size(3), "), got ",
              k.size(3));
  const int64_t heads = q.size(1), shared = k.size(1);
  TORCH_CHECK(heads == 0 || (shared > 0 && heads % shared == 0),
              "attention: expected the heads of k and v to divide those of q (", heads, "), got ", shared);
  TORCH_CHECK(q.size(3) <= kMaxHeadSize, "attention: expected a head size up to ", kMaxHeadSize,
              ", so that int32 is exact, got ", q.size(3));
  TORCH_CHECK(!scale.has_value() || std::isfinite(*scale), "attention: expected scale to be finite, got ",
              *scale);
  if (!mask.has_value()) return;
  TORCH_CHECK(mask->scalar_type() == at::kBool || at::isFloatingType(mask->scalar_type()),
              "attention: expected mask of dtype bool or a float dtype, got ",
              dtype_name(mask->scalar_type()));
  check_device("attention", q, "mask", *mask, "q");
  const std::array<int64_t, 4> shape = {q.size(0), heads, q.size(2), k.size(2)};
  bool fits = mask->dim() <= 4;
  for (int64_t d = 1; fits && d <= mask->dim(); ++d) {
    fits = mask->size(-d) == 1 || mask->size(-d) == shape[static_cast<size_t>(4 - d)];
  }
  TORCH_CHECK(fits, "attention: expected mask to broadcast to [B, H, S_q, S_kv] = ", at::IntArrayRef(shape),
              ", got ", mask->sizes());
  check_memory("attention", "mask", *mask);
}

}  // namespace dynquant
