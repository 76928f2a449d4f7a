// The functions for the tests. Each returns "" or a message.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "cuda/gemm.h"
#include "cuda/shared_layout.h"

using namespace dynquant;
using namespace dynquant::cuda;

namespace {

std::string message;

template <class Call>
const char* run(uint64_t seed, const Call& call) {
  cudaError_t error = cudaSuccess;
  emulated_device::launches = 0;
  message = emulator::run(seed, [&] { error = call(); });
  if (message.empty() && error != cudaSuccess) message = "CUDA error " + std::to_string(error);
  return message.c_str();
}

Device device() {
  return {emulated_device::capability, emulated_device::multiprocessors, emulated_device::code};
}

Rows rows(const void* x, int dtype, int64_t m, int64_t k, Rotation rotation = kNoRotation) {
  return {x, static_cast<Dtype>(dtype), m, k, k, rotation};
}

}  // namespace

extern "C" {

// code: the architecture that the kernels were compiled for.
void host_set_device(int capability, int multiprocessors, int code) {
  ++emulated_device::index;
  emulated_device::code = code;
  emulated_device::capability = capability;
  emulated_device::multiprocessors = multiprocessors;
}

int host_launches() { return emulated_device::launches; }

// Pages between two guard pages.
void* host_map(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t pages = (bytes + page - 1) / page * page;
  char* memory =
      static_cast<char*>(mmap(nullptr, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED) return nullptr;
  if (pages > 0 && mprotect(memory + page, pages, PROT_READ | PROT_WRITE) != 0) return nullptr;
  return memory + page;
}

void host_unmap(void* memory, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(static_cast<char*>(memory) - page, (bytes + page - 1) / page * page + 2 * page);
}

const char* host_min_max_rows(uint64_t seed, const void* x, int dtype, int64_t m, int64_t k, float* lo,
                              float* hi) {
  return run(seed, [&] { return min_max_rows(rows(x, dtype, m, k), lo, hi, nullptr); });
}

const char* host_min_max_tensor(uint64_t seed, const void* x, int dtype, int64_t m, int64_t k, float* lo,
                                float* hi, void* workspace) {
  return run(seed, [&] { return min_max_tensor(rows(x, dtype, m, k), lo, hi, workspace, nullptr); });
}

const char* host_choose_qparams(uint64_t seed, const float* lo, const float* hi, int64_t count, float* scale,
                                int32_t* zero_point) {
  return run(seed, [&] { return choose_qparams(lo, hi, count, scale, zero_point, nullptr); });
}

const char* host_quantize(uint64_t seed, const void* x, int dtype, int64_t m, int64_t k, const float* scale,
                          const int32_t* zero_point, bool per_row, int8_t* q) {
  return run(seed, [&] { return quantize(rows(x, dtype, m, k), scale, zero_point, per_row, q, nullptr); });
}

const char* host_rotate(uint64_t seed, const void* x, int dtype, int64_t m, int64_t k, int block, bool signs,
                        float* out) {
  return run(seed, [&] { return rotate(rows(x, dtype, m, k, {block, signs}), out, nullptr); });
}

size_t host_range_workspace() { return kRangeWorkspace; }

// With a null workspace only *workspace_bytes is set.
const char* host_int8_mm(uint64_t seed, const int8_t* q, const int8_t* weight, int64_t m, int64_t n,
                         int64_t k, int32_t* out, void* workspace, size_t* workspace_bytes) {
  const Int8Mm args = {q, weight, m, n, k, out};
  const Int8MmPlan plan = plan_int8_mm(args, device());
  *workspace_bytes = plan.workspace_bytes;
  if (workspace == nullptr) return "";
  return run(seed, [&] { return int8_mm(args, plan, device(), workspace, nullptr); });
}

const char* host_linear(uint64_t seed, const void* x, int dtype, int64_t m, int64_t k, int64_t n,
                        const int8_t* weight, const int32_t* weight_sum, const float* weight_scale,
                        const void* bias, int bias_dtype, const float* scale, const int32_t* zero_point,
                        int64_t config, void* out, int out_dtype, void* workspace, size_t* workspace_bytes) {
  const Linear args = {rows(x, dtype, m, k, decode_config(config).rotation),
                       n,
                       weight,
                       weight_sum,
                       weight_scale,
                       bias,
                       scale,
                       zero_point,
                       decode_config(config),
                       out,
                       static_cast<Dtype>(out_dtype),
                       static_cast<Dtype>(bias_dtype)};
  const LinearPlan plan = plan_linear(args, device());
  *workspace_bytes = plan.workspace_bytes;
  if (workspace == nullptr) return "";
  return run(seed, [&] { return linear(args, plan, device(), workspace, nullptr); });
}

// One GEMM kernel with the caller's tile and number of parts; out_dtype int32 returns the accumulators.
const char* host_gemm(uint64_t seed, int kernel, int tile_m, int tile_n, int parts, const int8_t* q,
                      int64_t row_bytes, const int8_t* weight, int64_t m, int64_t n, int64_t k,
                      const float* scale, const int32_t* zero_point, const int32_t* weight_sum,
                      const float* weight_scale, const float* bias, int function, void* out, int out_dtype,
                      void* workspace, size_t* workspace_bytes) {
  Gemm args = {};
  args.q = q;
  args.row_bytes = row_bytes;
  args.weight = weight;
  args.m = m;
  args.n = n;
  args.k = k;
  args.output =
      Output{out,  static_cast<Dtype>(out_dtype),  m, n, scale, zero_point, 1, weight_scale, weight_sum,
             bias, static_cast<Epilogue>(function)};
  const GemmPlan plan = with_parts({static_cast<GemmKernel>(kernel), tile_m, tile_n, 1, 0}, k, parts);
  const GemmShape shape = {m, n, k};
  *workspace_bytes = workspace_bytes == nullptr ? 0 : dynquant::cuda::workspace_bytes(plan, shape);
  if (workspace == nullptr) return "";
  return run(seed, [&] {
    cudaMemsetAsync(workspace, 0, counter_bytes(plan, shape), nullptr);
    return gemm(args, plan, device(), workspace, false, nullptr);
  });
}

// kernel, tile_m, tile_n, parts, k of a part.
void host_plan(int64_t m, int64_t n, int64_t k, int64_t* plan) {
  const GemmPlan chosen = plan_gemm({m, n, k}, device());
  plan[0] = static_cast<int64_t>(chosen.kernel);
  plan[1] = chosen.tile_m;
  plan[2] = chosen.tile_n;
  plan[3] = chosen.parts;
  plan[4] = chosen.k_of_part;
}

void host_tile_at(int64_t index, int64_t tiles_m, int64_t tiles_n, int64_t band, int64_t* tile) {
  const TileIndex found = tile_at(static_cast<uint32_t>(index), static_cast<uint32_t>(tiles_m),
                                  static_cast<uint32_t>(tiles_n), static_cast<uint32_t>(band));
  tile[0] = found.m;
  tile[1] = found.n;
}

int host_offset_in_rows_of_64(int row, int chunk) { return offset_in_rows_of_64(row, chunk); }

uint64_t host_descriptor_of_rows_of_128(uint32_t address) { return descriptor_of_rows_of_128(address); }

}  // extern "C"
