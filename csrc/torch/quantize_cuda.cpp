// The CUDA ops on rows of x: check, allocate, launch. Ops on weights, which are quantized and packed once,
// run the reference on the device.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "checks.h"
#include "cuda/kernels.h"
#include "cuda_call.h"

namespace dynquant::cuda {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> min_max_op(const Tensor& x, bool per_token) {
  if (is_too_old(x)) return run_reference<decltype(min_max_op)>("dynquant::min_max", x, per_token);
  check_float("min_max", "x", x);
  const OnDevice on("min_max", x);
  Tensor owner;
  const Rows rows = rows_of(x, kNoRotation, owner);
  const auto options = x.options().dtype(at::kFloat);
  Tensor lo = at::empty({per_token ? rows.m : 1}, options), hi = at::empty({per_token ? rows.m : 1}, options);
  if (per_token) {
    on.check(min_max_rows(rows, lo.mutable_data_ptr<float>(), hi.mutable_data_ptr<float>(), on.stream()));
  } else {
    const Tensor workspace = workspace_of(x, kRangeWorkspace);
    on.check(min_max_tensor(rows, lo.mutable_data_ptr<float>(), hi.mutable_data_ptr<float>(),
                            workspace.mutable_data_ptr(), on.stream()));
  }
  return {lo, hi};
}

std::tuple<Tensor, Tensor> choose_qparams_op(const Tensor& lo, const Tensor& hi) {
  if (is_too_old(lo)) return run_reference<decltype(choose_qparams_op)>("dynquant::choose_qparams", lo, hi);
  check_ranges("choose_qparams", lo, hi);
  const OnDevice on("choose_qparams", lo);
  const Tensor lows = lo.contiguous(), highs = hi.contiguous();
  Tensor scale = at::empty(lo.sizes(), lo.options()),
         zero_point = at::empty(lo.sizes(), lo.options().dtype(at::kInt));
  on.check(choose_qparams(lows.const_data_ptr<float>(), highs.const_data_ptr<float>(), lows.numel(),
                          scale.mutable_data_ptr<float>(), zero_point.mutable_data_ptr<int32_t>(),
                          on.stream()));
  return {scale, zero_point};
}

Tensor quantize_op(const Tensor& x, const Tensor& scale, const Tensor& zero_point) {
  if (is_too_old(x)) return run_reference<decltype(quantize_op)>("dynquant::quantize", x, scale, zero_point);
  check_float("quantize", "x", x);
  check_qparams("quantize", leading_size(x), scale, zero_point);
  check_device("quantize", x, "scale", scale);
  check_device("quantize", x, "zero_point", zero_point);
  const OnDevice on("quantize", x);
  Tensor owner;
  const Rows rows = rows_of(x, kNoRotation, owner);
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  on.check(quantize(rows, scales.const_data_ptr<float>(), zero_points.const_data_ptr<int32_t>(),
                    scale.size(0) != 1, q.mutable_data_ptr<int8_t>(), on.stream()));
  return q;
}

Tensor rotate_op(const Tensor& x, int64_t block, bool signs) {
  if (is_too_old(x)) return run_reference<decltype(rotate_op)>("dynquant::rotate", x, block, signs);
  check_float("rotate", "x", x);
  check_rotation("rotate", x.size(-1), block);
  const OnDevice on("rotate", x);
  Tensor owner;
  const Rows rows = rows_of(x, {static_cast<int>(block), signs}, owner);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  on.check(rotate(rows, out.mutable_data_ptr<float>(), on.stream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CUDA, m) {
  m.impl("min_max", min_max_op);
  m.impl("choose_qparams", choose_qparams_op);
  m.impl("quantize", quantize_op);
  m.impl("rotate", rotate_op);
}

}  // namespace dynquant::cuda
