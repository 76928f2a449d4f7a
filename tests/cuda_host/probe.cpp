// benchmarks/gpu/probe.cu over the emulator: its launches run to their end inside each call.
#include <cstdio>
#include <string>

#define probe_gemm launch_gemm
#define probe_quantize launch_quantize
#include "../../benchmarks/gpu/probe.cu"
#undef probe_gemm
#undef probe_quantize

namespace {

template <class Call>
int run(const Call& call) {
  static uint64_t seed = 0;
  cudaError_t error = cudaSuccess;
  const std::string fault = emulator::run(++seed, [&] { error = static_cast<cudaError_t>(call()); });
  if (!fault.empty()) std::fprintf(stderr, "%s\n", fault.c_str());
  return fault.empty() ? static_cast<int>(error) : -1;
}

}  // namespace

extern "C" int probe_gemm(const ProbeGemm* args, void* workspace, cudaStream_t stream) {
  return run([&] { return launch_gemm(args, workspace, stream); });
}

extern "C" int probe_quantize(const void* x, int32_t dtype, int64_t m, int64_t k, int32_t rotation_block,
                              int8_t* q, float* scale, int32_t* zero_point, cudaStream_t stream) {
  return run([&] { return launch_quantize(x, dtype, m, k, rotation_block, q, scale, zero_point, stream); });
}
