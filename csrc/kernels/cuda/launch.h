// Starts a kernel.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace dynquant::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool overlap = false;  // the kernel calls ptx::wait_for_previous_kernel and may start before that one ends
};

// Allows kKernel `bytes` of shared memory on the current device; one CUDA call per kernel and device.
template <auto kKernel>
cudaError_t allow_shared_bytes(size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  constexpr int kDevices = 64;
  static std::atomic<size_t> allowed[kDevices];
  if (bytes <= kWithoutAsking) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < kDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess && device < kDevices) allowed[device].store(bytes, std::memory_order_relaxed);
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_as(void (*kernel)(Parameters...), const Launch& spec, cudaStream_t stream,
                      const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (spec.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {spec.cluster, 1, 1};
    ++count;
  }
  if (spec.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = spec.grid;
  config.blockDim = dim3(spec.threads);
  config.dynamicSmemBytes = spec.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <auto kKernel, class... Arguments>
cudaError_t launch(const Launch& spec, cudaStream_t stream, const Arguments&... arguments) {
  const cudaError_t error = allow_shared_bytes<kKernel>(spec.shared_bytes);
  return error != cudaSuccess ? error : launch_as(kKernel, spec, stream, arguments...);
}

}  // namespace dynquant::cuda
