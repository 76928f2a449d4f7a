// The CPU ops on rows of x, and on weights, which are quantized and packed once: check, allocate, call.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu_call.h"
#include "cpu/pack.h"
#include "cpu/quantize.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

// ---- rows of x ----

std::tuple<Tensor, Tensor> min_max_op(const Tensor& x, bool per_token) {
  check_float("min_max", "x", x);
  Tensor owner;
  const Rows rows = rows_of(x, kNoRotation, owner);
  const auto options = x.options().dtype(at::kFloat);
  Tensor lo = at::empty({per_token ? rows.m : 1}, options), hi = at::empty({per_token ? rows.m : 1}, options);
  float* lo_data = lo.mutable_data_ptr<float>();
  float* hi_data = hi.mutable_data_ptr<float>();
  if (per_token) {
    min_max_rows(rows, lo_data, hi_data, torch_threads());
  } else {
    const RowsPlan plan = plan_min_max(rows, 1, torch_threads());
    Scratch scratch(plan.workspace_bytes);
    const Range range = min_max(rows, plan, scratch.data(), torch_threads());
    *lo_data = range.lo;
    *hi_data = range.hi;
  }
  return {lo, hi};
}

std::tuple<Tensor, Tensor> choose_qparams_op(const Tensor& lo, const Tensor& hi) {
  check_ranges("choose_qparams", lo, hi);
  const Tensor lows = lo.contiguous(), highs = hi.contiguous();
  Tensor scale = at::empty(lo.sizes(), lo.options()),
         zero_point = at::empty(lo.sizes(), lo.options().dtype(at::kInt));
  choose_qparams(lows.const_data_ptr<float>(), highs.const_data_ptr<float>(), lows.numel(),
                 scale.mutable_data_ptr<float>(), zero_point.mutable_data_ptr<int32_t>());
  return {scale, zero_point};
}

Tensor quantize_op(const Tensor& x, const Tensor& scale, const Tensor& zero_point) {
  check_float("quantize", "x", x);
  check_qparams("quantize", leading_size(x), scale, zero_point);
  check_device("quantize", x, "scale", scale);
  check_device("quantize", x, "zero_point", zero_point);
  Tensor owner;
  const Rows rows = rows_of(x, kNoRotation, owner);
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  quantize(rows, scales.const_data_ptr<float>(), zero_points.const_data_ptr<int32_t>(), scale.size(0) != 1,
           q.mutable_data_ptr<int8_t>(), torch_threads());
  return q;
}

Tensor rotate_op(const Tensor& x, int64_t block, bool signs) {
  check_float("rotate", "x", x);
  check_rotation("rotate", x.size(-1), block);
  Tensor owner;
  const Rows rows = rows_of(x, {static_cast<int>(block), signs}, owner);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  rotate(rows, out.mutable_data_ptr<float>(), torch_threads());
  return out;
}

// ---- weights ----

[[noreturn]] void report_non_finite(const Rows& weight, int64_t n) {
  std::vector<float> values(static_cast<size_t>(weight.k));
  read_row(weight, n, values.data());
  for (int64_t k = 0; k < weight.k; ++k) {
    const float value = values[static_cast<size_t>(k)];
    TORCH_CHECK(std::isfinite(value), "quantize_weight: expected weight to be finite, got ", value,
                " at weight[", n, ", ", k, "]");
  }
  TORCH_CHECK(false, "quantize_weight: expected the rotated weight to be finite, but row ", n, " overflows");
}

std::tuple<Tensor, Tensor> quantize_weight_op(const Tensor& weight, int64_t code) {
  const Config config = check_config(code);
  TORCH_CHECK(weight.dim() == 2, "quantize_weight: expected weight with 2 dimensions [N, K], got ",
              weight.dim());
  check_float("quantize_weight", "weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  if (config.rotation.block > 0) check_rotation("quantize_weight", k, config.rotation.block);
  Tensor owner;
  const Rows rows = rows_of(weight, config.rotation, owner);
  Tensor q = at::empty({n, k}, weight.options().dtype(at::kChar));
  Tensor scale = at::empty({config.weight_per_tensor ? 1 : n}, weight.options().dtype(at::kFloat));
  const QuantizeWeight args{rows, config.weight_per_tensor, scale.mutable_data_ptr<float>(),
                            q.mutable_data_ptr<int8_t>()};
  const RowsPlan plan = plan_quantize_weight(args, torch_threads());
  Scratch scratch(plan.workspace_bytes);
  const int64_t non_finite = quantize_weight(args, plan, scratch.data(), torch_threads());
  if (non_finite >= 0) report_non_finite(rows, non_finite);
  return {q, scale};
}

std::tuple<Tensor, Tensor> pack_weight_op(const Tensor& weight, bool full_range) {
  TORCH_CHECK(weight.scalar_type() == at::kChar && weight.dim() == 2,
              "pack_weight: expected weight to be int8 with 2 dimensions [N, K], got ",
              dtype_name(weight.scalar_type()), " with ", weight.dim());
  check_memory("pack_weight", "weight", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  const Tensor rows = weight.contiguous();
  const int8_t* data = rows.const_data_ptr<int8_t>();
  const int64_t at = full_range ? -1 : find_minus_128(data, n * k);
  TORCH_CHECK(at < 0, "pack_weight: expected weight in [-127, 127], got -128 at weight[", at / k, ", ",
              at % k, "]");
  Tensor packed = at::empty(packed_shape(n, k), weight.options()),
         sum = at::empty({n}, weight.options().dtype(at::kInt));
  pack_weight(data, n, k, packed.mutable_data_ptr<int8_t>(), sum.mutable_data_ptr<int32_t>(),
              torch_threads());
  return {packed, sum};
}

Tensor unpack_weight_op(const Tensor& packed_weight, int64_t n, int64_t k) {
  check_packed("unpack_weight", packed_weight, packed_shape(n, k), n, k);
  Tensor weight = at::empty({n, k}, packed_weight.options());
  unpack_weight(packed_weight.const_data_ptr<int8_t>(), n, k, weight.mutable_data_ptr<int8_t>(),
                torch_threads());
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) {
  m.impl("min_max", min_max_op);
  m.impl("choose_qparams", choose_qparams_op);
  m.impl("quantize", quantize_op);
  m.impl("rotate", rotate_op);
  m.impl("quantize_weight", quantize_weight_op);
  m.impl("pack_weight", pack_weight_op);
  m.impl("unpack_weight", unpack_weight_op);
}

}  // namespace dynquant::cpu
