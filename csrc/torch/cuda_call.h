// Shared by the CUDA bindings: the device and stream of a call, the reference for cards that are too old,
// tensors in the form that the kernels read. libc10's virtual guard gives stream and device, so that the
// bindings compile and link under a torch without CUDA too.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <string>

#include "checks.h"
#include "cuda/kernels.h"

namespace dynquant::cuda {

// Sets the current device of this module's own copy of the CUDA runtime, after a query, which costs less.
inline cudaError_t use_device(int index) {
  int current = -1;
  const cudaError_t error = cudaGetDevice(&current);
  return error == cudaSuccess && current == index ? cudaSuccess : cudaSetDevice(index);
}

// Makes the device of a tensor the current one, for torch and for this module's own copy of the CUDA runtime.
class OnDevice {
 public:
  OnDevice(const char* op, const at::Tensor& x) : op_(op), device_(x.device()), guard_(device_) {
    const c10::impl::VirtualGuardImpl torch(device_.type());
    stream_ = static_cast<cudaStream_t>(torch.getStreamNativeHandle(torch.getStream(device_)));
    check(use_device(device_.index()));
    check(current_device(&properties_));
  }

  cudaStream_t stream() const { return stream_; }
  const Device& properties() const { return properties_; }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error: later calls of the process must not report it again
    const int capability = properties_.capability;
    const std::string capability_text = capability == 0
                                            ? ""
                                            : " (compute capability " + std::to_string(capability / 10) +
                                                  "." + std::to_string(capability % 10) + ")";
    TORCH_CHECK(false, op_, ": CUDA kernels on ", device_, capability_text,
                " failed: ", cudaGetErrorString(error),
                "; `python -m dynquant info` says which devices they were built for");
  }

 private:
  const char* op_;
  c10::Device device_;
  c10::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  Device properties_ = {};
};

// Whether the card's compute capability is too low for the kernels. Called for every op, so it is cached.
inline bool is_too_old(const at::Tensor& x) {
  if (!x.is_cuda()) return false;  // the checks reject it
  thread_local int known_index = -1, major = 0;
  const int index = x.device().index();
  if (index != known_index) {
    // If CUDA fails here, the kernels' own calls report why.
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) != cudaSuccess) return false;
    known_index = index;
  }
  return major < 8;
}

// Runs the reference on the device of its arguments: it is the dispatcher's kernel without a dispatch key.
template <typename Op, typename... Args>
auto run_reference(const char* name, const Args&... args) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
  return op.redispatch(c10::DispatchKeySet(), args...);
}

// x as contiguous rows; `owner` keeps x, or its copy (of fp64 or strided x), alive.
inline Rows rows_of(const at::Tensor& x, Rotation rotation, at::Tensor& owner) {
  owner = (x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x).contiguous();
  const int64_t k = x.size(-1);
  return Rows{owner.const_data_ptr(), dtype_of(owner.scalar_type()), leading_size(x), k, k, rotation};
}

// Scratch memory for the call; later work on the stream may reuse it. An undefined tensor for 0 bytes.
inline at::Tensor workspace_of(const at::Tensor& x, size_t bytes) {
  if (bytes == 0) return {};
  return at::empty({static_cast<int64_t>(bytes)}, x.options().dtype(at::kByte));
}

inline void* data_of(const at::Tensor& workspace) {
  return workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
}

}  // namespace dynquant::cuda
