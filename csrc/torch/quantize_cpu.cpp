// The CPU ops on rows of x: check, allocate, call.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "cpu_call.h"
#include "cpu/quantize.h"

namespace dynquant::cpu {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> min_max_op(const Tensor& x, bool per_token) {
  check_float("min_max", "x", x);
  Tensor owner;
  const Rows rows = rows_of(x, 0, owner);
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
  const Rows rows = rows_of(x, 0, owner);
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  quantize(rows, scales.const_data_ptr<float>(), zero_points.const_data_ptr<int32_t>(), scale.size(0) != 1,
           q.mutable_data_ptr<int8_t>(), torch_threads());
  return q;
}

Tensor rotate_op(const Tensor& x, int64_t block) {
  check_float("rotate", "x", x);
  check_rotation("rotate", x.size(-1), block);
  Tensor owner;
  const Rows rows = rows_of(x, static_cast<int>(block), owner);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  rotate(rows, out.mutable_data_ptr<float>(), torch_threads());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CPU, m) {
  m.impl("min_max", min_max_op);
  m.impl("choose_qparams", choose_qparams_op);
  m.impl("quantize", quantize_op);
  m.impl("rotate", rotate_op);
}

}  // namespace dynquant::cpu
