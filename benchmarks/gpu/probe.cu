// The kernels one by one, for benchmarks/gpu/probe.py: a GEMM with a kernel, tile and number of parts of the caller's
// choice (or the plan's own) and any epilogue, and the quantize kernel alone. The package's own entry points are in
// csrc/cuda/kernels.h; this file links their objects and is no part of it.
#include "cuda/gemm.h"
#include "cuda/quantize.h"

#define DYNQUANT_EXPORT __attribute__((visibility("default")))

using namespace dynquant;
using namespace dynquant::cuda;

extern "C" {

// One product. probe.py declares the same fields.
struct ProbeGemm {
  int32_t kernel;  // of GemmKernel, -1: the plan's choice, and tile_m, tile_n and parts are not read
  int32_t tile_m;
  int32_t tile_n;
  int32_t parts;
  const int8_t* q;  // [m, q_row_bytes], zeros beyond k
  int64_t q_row_bytes;
  const int8_t* weight;  // [n, k]
  int64_t m;
  int64_t n;
  int64_t k;
  void* out;                  // [m, n]
  int32_t out_dtype;          // of DType; with int32 nothing below is read
  int32_t function;           // of Epilogue
  const float* scale;         // [m]
  const int32_t* zero_point;  // [m]
  const float* weight_scale;  // [n]
  const int32_t* weight_sum;  // [n]
  const float* bias;          // [n], or null
};

DYNQUANT_EXPORT int probe_device(int32_t* capability, int32_t* multiprocessors, int32_t* code) {
  Device device = {};
  const cudaError_t error = current_device(&device);
  *capability = device.capability;
  *multiprocessors = device.multiprocessors;
  *code = device.code;
  return error;
}

static Gemm gemm_of(const ProbeGemm& args) {
  Gemm gemm = {};
  gemm.q = args.q;
  gemm.q_row_bytes = args.q_row_bytes;
  gemm.weight = args.weight;
  gemm.m = args.m;
  gemm.n = args.n;
  gemm.k = args.k;
  gemm.output = Output{args.out,
                       static_cast<DType>(args.out_dtype),
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

static GemmPlan plan_of(const ProbeGemm& args, const GemmShape& shape, const Device& device) {
  if (args.kernel < 0) return plan_gemm(shape, device);
  return with_parts({static_cast<GemmKernel>(args.kernel), args.tile_m, args.tile_n, 1, 0}, args.k,
                    args.parts);
}

// The plan: {kernel, tile_m, tile_n, parts}, and the bytes of workspace that probe_gemm needs.
DYNQUANT_EXPORT int probe_plan(const ProbeGemm* args, int32_t* plan, int64_t* workspace) {
  Device device = {};
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const GemmShape shape = {args->m, args->n, args->k, is_aligned_weight(gemm_of(*args))};
  const GemmPlan chosen = plan_of(*args, shape, device);
  plan[0] = static_cast<int32_t>(chosen.kernel);
  plan[1] = chosen.tile_m;
  plan[2] = chosen.tile_n;
  plan[3] = chosen.parts;
  *workspace = static_cast<int64_t>(workspace_bytes(chosen, shape));
  return cudaSuccess;
}

DYNQUANT_EXPORT int probe_gemm(const ProbeGemm* args, void* workspace, cudaStream_t stream) {
  Device device = {};
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const Gemm gemm_args = gemm_of(*args);
  const GemmShape shape = {args->m, args->n, args->k, is_aligned_weight(gemm_args)};
  const GemmPlan plan = plan_of(*args, shape, device);
  if (plan.parts > 1) error = cudaMemsetAsync(workspace, 0, counter_bytes(plan, shape), stream);
  if (error != cudaSuccess) return error;
  return gemm(gemm_args, plan, device, workspace, false, stream);
}

// per_token: q [m, k rounded up to a multiple of 16], scale and zero_point [m].
DYNQUANT_EXPORT int probe_quantize(const void* x, int32_t dtype, int64_t m, int64_t k, int32_t rotation_block,
                                   int8_t* q, float* scale, int32_t* zero_point, cudaStream_t stream) {
  Device device = {};
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  QuantizeRows args = {};
  args.x = Rows{x, static_cast<DType>(dtype), m, k};
  args.rotation_block = rotation_block;
  args.from = QparamsFrom::kRow;
  args.q = q;
  args.row_bytes = (k + 15) / 16 * 16;
  args.scale = scale;
  args.zero_point = zero_point;
  return quantize_rows(args, device, false, stream);
}

}  // extern "C"
