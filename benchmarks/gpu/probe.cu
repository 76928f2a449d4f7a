// Single kernels on raw pointers, for benchmarks/gpu/probe.py: a GEMM with the caller's kernel, tile and
// number of parts (or the plan's) and any epilogue, the quantize kernel alone, a whole forward. The package's
// entry points are in csrc/kernels/cuda/kernels.h; this file links their objects and is no part of the
// package.
#include "cuda/gemm.h"
#include "cuda/quantize.h"

#define PROBE_EXPORT extern "C" __attribute__((visibility("default")))

// Runs a call that launches kernels; the emulator of the tests defines its own.
#ifndef PROBE_RUN
#define PROBE_RUN(call) static_cast<int>((call)())
#endif

using namespace dynquant;
using namespace dynquant::cuda;

// The caller's choice. kernel: of GemmKernel, or -1 for the choice of gemm_plan.h.
struct ProbeTile {
  int32_t kernel;
  int32_t m;
  int32_t n;
  int32_t parts;
};

// probe.py declares the same fields.
struct ProbeGemm {
  ProbeTile tile;
  const int8_t* q;       // [m, row_bytes], zeros beyond k
  const int8_t* weight;  // [n, row_bytes], zeros beyond k
  int64_t row_bytes;     // k, rounded up to a multiple of 16
  int64_t m;
  int64_t n;
  int64_t k;
  void* out;                  // [m, n]
  int32_t out_dtype;          // of Dtype; int32 ignores the fields below
  int32_t function;           // of Epilogue
  const float* scale;         // [m]
  const int32_t* zero_point;  // [m]
  const float* weight_scale;  // [n]
  const int32_t* weight_sum;  // [n]
  const float* bias;          // [n], or null
};

struct ProbeLinear {
  ProbeTile tile;
  int32_t separate;  // not 0: quantize in a separate launch, whatever the plan
  int32_t unused;
  const void* x;  // [m, k]
  int32_t x_dtype;
  int32_t out_dtype;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t config;        // dynquant/config.py's int
  const int8_t* weight;  // [n, k rounded up to a multiple of 16], zeros beyond k
  const int32_t* weight_sum;
  const float* weight_scale;
  const float* bias;          // or null
  const float* scale;         // [1], or null: chosen from x
  const int32_t* zero_point;  // [1], with scale
  void* out;                  // [m, n]
};

PROBE_EXPORT int probe_device(int32_t* capability, int32_t* multiprocessors, int32_t* code) {
  Device device = {};
  const cudaError_t error = current_device(&device);
  *capability = device.capability;
  *multiprocessors = device.multiprocessors;
  *code = device.code;
  return error;
}

// ---- memory, for a caller without torch ----

PROBE_EXPORT void* probe_allocate(int64_t bytes) {
  void* memory = nullptr;
  return cudaMalloc(&memory, static_cast<size_t>(bytes)) == cudaSuccess ? memory : nullptr;
}

PROBE_EXPORT int probe_free(void* memory) { return cudaFree(memory); }

// To or from the device, after a synchronization.
PROBE_EXPORT int probe_copy(void* target, const void* source, int64_t bytes) {
  const cudaError_t error = cudaDeviceSynchronize();
  return error != cudaSuccess ? error
                              : cudaMemcpy(target, source, static_cast<size_t>(bytes), cudaMemcpyDefault);
}

// ---- products ----

static Gemm gemm_of(const ProbeGemm& args) {
  Gemm gemm = {};
  gemm.q = args.q;
  gemm.weight = args.weight;
  gemm.row_bytes = args.row_bytes;
  gemm.m = args.m;
  gemm.n = args.n;
  gemm.k = args.k;
  gemm.output = Output{args.out,
                       static_cast<Dtype>(args.out_dtype),
                       args.m,
                       args.n,
                       args.scale,
                       args.zero_point,
                       1,
                       args.weight_scale,
                       args.weight_sum,
                       args.bias,
                       static_cast<Epilogue>(args.function)};
  return gemm;
}

static GemmPlan plan_of(const ProbeTile& tile, const GemmShape& shape, const Device& device) {
  if (tile.kernel < 0) return plan_gemm(shape, device);
  return with_parts({static_cast<GemmKernel>(tile.kernel), tile.m, tile.n, 1, 0}, shape.k, tile.parts);
}

static void write_plan(const GemmPlan& plan, ProbeTile* tile) {
  *tile = {static_cast<int32_t>(plan.kernel), plan.tile_m, plan.tile_n, plan.parts};
}

// The plan of probe_gemm and its workspace in bytes.
PROBE_EXPORT int probe_gemm_plan(const ProbeGemm* args, ProbeTile* tile, int32_t* fused, int64_t* workspace) {
  Device device = {};
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const GemmShape shape = {args->m, args->n, args->k};
  const GemmPlan plan = plan_of(args->tile, shape, device);
  write_plan(plan, tile);
  *fused = 0;
  *workspace = static_cast<int64_t>(workspace_bytes(plan, shape));
  return cudaSuccess;
}

PROBE_EXPORT int probe_gemm(const ProbeGemm* args, void* workspace, cudaStream_t stream) {
  return PROBE_RUN(([&] {
    Device device = {};
    cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    const GemmShape shape = {args->m, args->n, args->k};
    const GemmPlan plan = plan_of(args->tile, shape, device);
    if (plan.parts > 1) error = cudaMemsetAsync(workspace, 0, counter_bytes(plan, shape), stream);
    if (error != cudaSuccess) return error;
    return gemm(gemm_of(*args), plan, device, workspace, false, stream);
  }));
}

static Linear linear_of(const ProbeLinear& args) {
  Linear linear = {};
  const Config config = decode_config(args.config);
  linear.x = Rows{args.x, static_cast<Dtype>(args.x_dtype), args.m, args.k, args.k, config.rotation};
  linear.n = args.n;
  linear.weight = args.weight;
  linear.weight_sum = args.weight_sum;
  linear.weight_scale = args.weight_scale;
  linear.bias = args.bias;
  linear.scale = args.scale;
  linear.zero_point = args.zero_point;
  linear.config = config;
  linear.out = args.out;
  linear.out_dtype = static_cast<Dtype>(args.out_dtype);
  return linear;
}

static LinearPlan plan_of(const ProbeLinear& args, const Linear& linear, const Device& device) {
  LinearPlan plan = plan_linear(linear, device);
  if (args.tile.kernel < 0 && (args.separate == 0 || !plan.fused)) return plan;
  const GemmShape shape = {args.m, args.n, args.k};
  if (args.tile.kernel >= 0) plan.gemm = plan_of(args.tile, shape, device);
  plan.fused = false;
  // For the forced kernel and, after a fused plan, for q, qparams and ranges; rounded up.
  plan.workspace_bytes += workspace_bytes(plan.gemm, shape) + args.m * (padded_k(args.k) + 8) + 16384;
  return plan;
}

// The plan of probe_linear, whether its GEMM quantizes x, and its workspace in bytes.
PROBE_EXPORT int probe_linear_plan(const ProbeLinear* args, ProbeTile* tile, int32_t* fused,
                                   int64_t* workspace) {
  Device device = {};
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const LinearPlan plan = plan_of(*args, linear_of(*args), device);
  write_plan(plan.gemm, tile);
  *fused = plan.fused;
  *workspace = static_cast<int64_t>(plan.workspace_bytes);
  return cudaSuccess;
}

PROBE_EXPORT int probe_linear(const ProbeLinear* args, void* workspace, cudaStream_t stream) {
  return PROBE_RUN(([&] {
    Device device = {};
    const cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    const Linear linear_args = linear_of(*args);
    return linear(linear_args, plan_of(*args, linear_args, device), device, workspace, stream);
  }));
}

// per_token: q [m, k rounded up to a multiple of 16], scale and zero_point [m].
PROBE_EXPORT int probe_quantize(const void* x, int32_t dtype, int64_t m, int64_t k, int32_t block,
                                int32_t signs, int8_t* q, float* scale, int32_t* zero_point,
                                cudaStream_t stream) {
  return PROBE_RUN(([&] {
    Device device = {};
    const cudaError_t error = current_device(&device);
    if (error != cudaSuccess) return error;
    QuantizeRows args = {};
    args.x = Rows{x, static_cast<Dtype>(dtype), m, k, k, Rotation{block, signs != 0}};
    args.from = QParamsFrom::kRow;
    args.q = q;
    args.row_bytes = (k + 15) / 16 * 16;
    args.scale = scale;
    args.zero_point = zero_point;
    return quantize_rows(args, device, false, stream);
  }));
}
