// The CUDA ops: check, allocate, launch on the current stream. Stream and device are reached through libc10's virtual
// guard, so that this file compiles and links under a torch without CUDA too. What is not here (weights, which are
// quantized and packed once) runs the reference, on the device.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "cuda/kernels.h"

namespace dynquant::cuda {
namespace {

using at::Tensor;

// The current device of this module's own copy of the CUDA runtime. Asking costs less than setting.
cudaError_t use_device(int index) {
  int current = -1;
  const cudaError_t error = cudaGetDevice(&current);
  return error == cudaSuccess && current == index ? cudaSuccess : cudaSetDevice(index);
}

// Makes the device of a tensor the current one, for torch and for this module's own copy of the CUDA runtime.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& x) : op_(op), device_(x.device()), guard_(device_) {
    const c10::impl::VirtualGuardImpl torch(device_.type());
    stream_ = static_cast<cudaStream_t>(torch.getStreamNativeHandle(torch.getStream(device_)));
    check(use_device(device_.index()));
    check(current_device(&properties_));
  }

  cudaStream_t stream() const { return stream_; }
  const Device& properties() const { return properties_; }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // so that it is not reported again by whoever asks next
    const int capability = properties_.capability;
    const std::string of = capability == 0 ? ""
                                           : " (compute capability " + std::to_string(capability / 10) + "." +
                                                 std::to_string(capability % 10) + ")";
    TORCH_CHECK(false, op_, ": CUDA kernels on ", device_, of, " failed: ", cudaGetErrorString(error),
                "; `python -m dynquant info` says which devices they were built for");
  }

 private:
  const char* op_;
  c10::Device device_;
  c10::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Device properties_ = {};
};

// Cards of a lower compute capability than the kernels are built for. Asked at every call, so the answer is kept.
bool is_too_old(const Tensor& x) {
  if (!x.is_cuda()) return false;  // the checks refuse it
  thread_local int known_index = -1, major = 0;
  const int index = x.device().index();
  if (index != known_index) {
    // Where CUDA does not answer, the kernels' own calls say why.
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess) return false;
    known_index = index;
  }
  return major < 8;
}

// The reference, on the device of its arguments: the kernel that the dispatcher has for no device in particular.
template <typename Op, typename... Args>
auto run_reference(const char* name, const Args&... args) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
  return op.redispatch(c10::DispatchKeySet(), args...);
}

DType dtype_of(at::ScalarType type) {
  return type == at::kFloat ? DType::kFloat32 : type == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

// x as contiguous rows; `owner` keeps the copy alive where one was needed (fp64, strides).
Rows rows_of(const Tensor& x, Tensor& owner) {
  owner = (x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x).contiguous();
  return Rows{owner.const_data_ptr(), dtype_of(owner.scalar_type()), leading_size(x), x.size(-1)};
}

// Scratch memory until the end of the call: the next user of the stream may have it afterwards. Undefined for 0 bytes.
Tensor workspace_of(const Tensor& x, size_t bytes) {
  if (bytes == 0) return {};
  return at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
}

void* data_of(const Tensor& workspace) {
  return workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
}

// ---- single steps ----

std::tuple<Tensor, Tensor> min_max_op(const Tensor& x, bool per_token) {
  if (is_too_old(x)) return run_reference<decltype(min_max_op)>("dynquant::min_max", x, per_token);
  check_float("min_max", "x", x);
  const OnDevice on("min_max", x);
  Tensor owner;
  const Rows rows = rows_of(x, owner);
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
  const Rows rows = rows_of(x, owner);
  const Tensor scales = scale.contiguous(), zero_points = zero_point.contiguous();
  Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  on.check(quantize(rows, scales.const_data_ptr<float>(), zero_points.const_data_ptr<int32_t>(),
                    scale.size(0) != 1, q.mutable_data_ptr<int8_t>(), on.stream()));
  return q;
}

Tensor rotate_op(const Tensor& x, int64_t block) {
  if (is_too_old(x)) return run_reference<decltype(rotate_op)>("dynquant::rotate", x, block);
  check_float("rotate", "x", x);
  check_rotation("rotate", x.size(-1), block);
  const OnDevice on("rotate", x);
  Tensor owner;
  const Rows rows = rows_of(x, owner);
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  on.check(rotate(rows, static_cast<int>(block), out.mutable_data_ptr<float>(), on.stream()));
  return out;
}

// ---- products ----

// Rows of a packed weight are padded with zeros to multiples of 16 bytes.
void check_packed_rows(const char* op, const Tensor& packed_weight, int64_t n, int64_t k) {
  check_packed(op, packed_weight, {n, (k + 15) / 16 * 16}, n, k);
}

// Where the kernels read a packed weight: rows at multiples of 16 bytes. Memory of torch's allocator starts at
// such a multiple; a view into another storage may not, and is copied. `owner` keeps the copy alive.
const int8_t* aligned_rows(const Tensor& packed_weight, Tensor& owner) {
  const auto* rows = packed_weight.const_data_ptr<int8_t>();
  if (reinterpret_cast<uintptr_t>(rows) % 16 == 0) return rows;
  owner = packed_weight.clone();
  return owner.const_data_ptr<int8_t>();
}

Tensor int8_mm_op(const Tensor& q, const Tensor& packed_weight, const Tensor& weight_sum) {
  if (is_too_old(q))
    return run_reference<decltype(int8_mm_op)>("dynquant::int8_mm", q, packed_weight, weight_sum);
  check_int8_mm(q, packed_weight, weight_sum);
  const int64_t m = q.size(0), k = q.size(1), n = weight_sum.size(0);
  check_packed_rows("int8_mm", packed_weight, n, k);
  const OnDevice on("int8_mm", q);
  const Tensor rows = q.contiguous();
  Tensor weight_owner;
  Tensor out = at::empty({m, n}, q.options().dtype(at::kInt));
  const Int8Mm args = {rows.const_data_ptr<int8_t>(),  aligned_rows(packed_weight, weight_owner), m, n, k,
                       out.mutable_data_ptr<int32_t>()};
  const Int8MmPlan plan = plan_int8_mm(args, on.properties());
  const Tensor workspace = workspace_of(q, plan.workspace_bytes);
  on.check(int8_mm(args, plan, on.properties(), data_of(workspace), on.stream()));
  return out;
}

// scale, zero_point: of linear_static, null for linear_dynamic.
Tensor linear_op(const char* op, const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                 const Tensor& weight_scale, const std::optional<Tensor>& bias, const Tensor* scale,
                 const Tensor* zero_point, int64_t code) {
  check_linear(op, x, packed_weight, weight_sum, weight_scale, bias);
  const Config config = check_config(code);
  const int64_t n = weight_scale.size(0), k = x.size(-1);
  check_packed_rows(op, packed_weight, n, k);
  check_k(op, k, code);
  if (config.rotation_block > 0) check_rotation(op, k, config.rotation_block);

  const OnDevice on(op, x);
  Tensor owner, weight_owner;
  const Rows rows = rows_of(x, owner);
  // fp64 is computed through fp32.
  const at::ScalarType wanted = out_dtype(config, x);
  const at::ScalarType computed = wanted == at::kDouble ? at::kFloat : wanted;
  c10::SmallVector<int64_t, 5> out_shape(x.sizes().begin(), x.sizes().end());
  out_shape.back() = n;
  Tensor out = at::empty(out_shape, x.options().dtype(computed));

  const Linear args = {rows,
                       n,
                       aligned_rows(packed_weight, weight_owner),
                       weight_sum.const_data_ptr<int32_t>(),
                       weight_scale.const_data_ptr<float>(),
                       bias.has_value() ? bias->const_data_ptr<float>() : nullptr,
                       scale != nullptr ? scale->const_data_ptr<float>() : nullptr,
                       zero_point != nullptr ? zero_point->const_data_ptr<int32_t>() : nullptr,
                       config,
                       out.mutable_data_ptr(),
                       dtype_of(computed)};
  const LinearPlan plan = plan_linear(args, on.properties());
  const Tensor workspace = workspace_of(x, plan.workspace_bytes);
  on.check(linear(args, plan, on.properties(), data_of(workspace), on.stream()));
  return wanted == computed ? out : out.to(wanted);
}

Tensor linear_dynamic_op(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                         const Tensor& weight_scale, const std::optional<Tensor>& bias, int64_t config) {
  if (is_too_old(x))
    return run_reference<decltype(linear_dynamic_op)>("dynquant::linear_dynamic", x, packed_weight,
                                                      weight_sum, weight_scale, bias, config);
  return linear_op("linear_dynamic", x, packed_weight, weight_sum, weight_scale, bias, nullptr, nullptr,
                   config);
}

Tensor linear_static_op(const Tensor& x, const Tensor& packed_weight, const Tensor& weight_sum,
                        const Tensor& weight_scale, const std::optional<Tensor>& bias, const Tensor& scale,
                        const Tensor& zero_point, int64_t config) {
  if (is_too_old(x))
    return run_reference<decltype(linear_static_op)>("dynquant::linear_static", x, packed_weight, weight_sum,
                                                     weight_scale, bias, scale, zero_point, config);
  check_qparams("linear_static", 1, scale, zero_point);
  check_device("linear_static", x, "scale", scale);
  check_device("linear_static", x, "zero_point", zero_point);
  return linear_op("linear_static", x, packed_weight, weight_sum, weight_scale, bias, &scale, &zero_point,
                   config);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynquant, CUDA, m) {
  m.impl("min_max", min_max_op);
  m.impl("choose_qparams", choose_qparams_op);
  m.impl("quantize", quantize_op);
  m.impl("rotate", rotate_op);
  m.impl("int8_mm", int8_mm_op);
  m.impl("linear_dynamic", linear_dynamic_op);
  m.impl("linear_static", linear_static_op);
}

}  // namespace dynquant::cuda
