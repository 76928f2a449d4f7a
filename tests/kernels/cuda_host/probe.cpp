// benchmarks/gpu/probe.cu over the emulator: its launches run to their end inside each call.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

template <class Call>
int run_to_end(const Call& call) {
  static uint64_t seed = 0;
  cudaError_t error = cudaSuccess;
  const std::string fault = emulator::run(++seed, [&] { error = call(); });
  if (!fault.empty()) std::fprintf(stderr, "%s\n", fault.c_str());
  return fault.empty() ? static_cast<int>(error) : -1;
}

// Memory of the emulated device is the host's.
enum { cudaMemcpyDefault };

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, int) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

}  // namespace

#define PROBE_RUN(call) run_to_end(call)
#include "../../../benchmarks/gpu/probe.cu"
