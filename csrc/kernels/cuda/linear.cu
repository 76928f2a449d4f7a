// Whole products: the sequence of kernels, and the places of their intermediate results in the workspace.
#include "gemm.h"
#include "launch.h"
#include "linear_small.h"
#include "quantize.h"

namespace dynquant::cuda {
namespace {

// Divides a workspace into pieces; with a null workspace it only adds up their sizes.
class Carver {
 public:
  explicit Carver(void* workspace) : base_(static_cast<char*>(workspace)) {}

  template <class T>
  T* take(int64_t count) {
    T* const piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 256));
    return piece;
  }

  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct LinearWorkspace {
  int8_t* q;
  float* scale;
  int32_t* zero_point;
  Range* ranges;
  char* gemm_workspace;
};

GemmShape shape_of(const Linear& args) { return {args.x.m, args.n, args.x.k}; }

bool finds_ranges(const Linear& args) { return args.config.per_tensor && args.scale == nullptr; }

LinearWorkspace carve(const Linear& args, const GemmPlan& plan, Carver& carver) {
  LinearWorkspace pieces = {};
  const int64_t rows = finds_ranges(args) ? 1 : args.x.m;
  pieces.q = carver.take<int8_t>(args.x.m * padded_k(args.x.k));
  pieces.scale = carver.take<float>(rows);
  pieces.zero_point = carver.take<int32_t>(rows);
  pieces.ranges = carver.take<Range>(finds_ranges(args) ? kMaxRanges : 0);
  pieces.gemm_workspace = carver.take<char>(static_cast<int64_t>(workspace_bytes(plan, shape_of(args))));
  return pieces;
}

struct Int8MmWorkspace {
  int8_t* q;  // null: the caller's q is read in place
  char* gemm_workspace;
};

GemmShape shape_of(const Int8Mm& args) { return {args.m, args.n, args.k}; }

Int8MmWorkspace carve(const Int8Mm& args, const GemmPlan& plan, bool copies_q, Carver& carver) {
  Int8MmWorkspace pieces = {};
  if (copies_q) pieces.q = carver.take<int8_t>(args.m * padded_k(args.k));
  pieces.gemm_workspace = carver.take<char>(static_cast<int64_t>(workspace_bytes(plan, shape_of(args))));
  return pieces;
}

// Quantizes x, and sets the counters of the GEMM's parts of k to 0.
cudaError_t quantize_x(const Linear& args, const LinearPlan& plan, const LinearWorkspace& pieces,
                       const Device& device, cudaStream_t stream) {
  QuantizeRows rows = {};
  rows.x = args.x;
  rows.from = args.scale != nullptr ? QParamsFrom::kStatic
              : finds_ranges(args)  ? QParamsFrom::kRanges
                                    : QParamsFrom::kRow;
  rows.given_scale = args.scale;
  rows.given_zero_point = args.zero_point;
  rows.q = pieces.q;
  rows.row_bytes = padded_k(args.x.k);
  rows.scale = pieces.scale;
  rows.zero_point = pieces.zero_point;
  rows.counters = reinterpret_cast<int32_t*>(pieces.gemm_workspace);
  rows.counter_count = static_cast<int64_t>(counter_bytes(plan.gemm, shape_of(args)) / sizeof(int32_t));
  if (finds_ranges(args)) {
    const cudaError_t error = find_ranges(args.x, device, pieces.ranges, &rows.range_count, stream);
    if (error != cudaSuccess) return error;
    rows.ranges = pieces.ranges;
  }
  return quantize_rows(rows, device, kernels_overlap(device), stream);
}

}  // namespace

cudaError_t gemm(const Gemm& args, const GemmPlan& plan, const Device& device, void* workspace, bool overlap,
                 cudaStream_t stream) {
  PartialSums partial = {};
  if (plan.parts > 1) {
    const GemmShape shape = {args.m, args.n, args.k};
    partial.counters = static_cast<int32_t*>(workspace);
    partial.sums = reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + counter_bytes(plan, shape));
  }
  switch (plan.kernel) {
    case GemmKernel::kSmall: return gemm_small(args, plan, partial, overlap, stream);
    case GemmKernel::kMma: return gemm_mma(args, plan, partial, overlap, stream);
    default: return gemm_wgmma(args, plan, device, overlap, stream);
  }
}

LinearPlan plan_linear(const Linear& args, const Device& device) {
  LinearPlan plan = {};
  plan.gemm = plan_gemm(shape_of(args), device);
  plan.fused = linear_small_supports(args, plan.gemm, device);
  if (!plan.fused) {
    Carver carver(nullptr);
    carve(args, plan.gemm, carver);
    plan.workspace_bytes = carver.used();
  }
  return plan;
}

cudaError_t linear(const Linear& args, const LinearPlan& plan, const Device& device, void* workspace,
                   cudaStream_t stream) {
  if (args.x.m == 0 || args.n == 0) return cudaSuccess;
  Output output = {};
  output.data = args.out;
  output.dtype = args.out_dtype;
  output.m = args.x.m;
  output.n = args.n;
  output.row_stride = finds_ranges(args) ? 0 : 1;
  output.weight_scale = args.weight_scale;
  output.weight_sum = args.weight_sum;
  output.bias = args.bias;
  output.bias_dtype = args.bias_dtype;
  output.function = args.config.epilogue;
  if (plan.fused) return linear_small(args, output, kernels_overlap(device), stream);

  Carver carver(workspace);
  const LinearWorkspace pieces = carve(args, plan.gemm, carver);
  const cudaError_t error = quantize_x(args, plan, pieces, device, stream);
  if (error != cudaSuccess) return error;
  output.scale = pieces.scale;
  output.zero_point = pieces.zero_point;
  const Gemm product = {pieces.q, args.weight, padded_k(args.x.k), args.x.m, args.n, args.x.k, output};
  return gemm(product, plan.gemm, device, pieces.gemm_workspace, kernels_overlap(device), stream);
}

Int8MmPlan plan_int8_mm(const Int8Mm& args, const Device& device) {
  Int8MmPlan plan = {};
  plan.gemm = plan_gemm(shape_of(args), device);
  plan.copies_q = args.k % 16 != 0 || reinterpret_cast<uintptr_t>(args.q) % 16 != 0;
  Carver carver(nullptr);
  carve(args, plan.gemm, plan.copies_q, carver);
  plan.workspace_bytes = carver.used();
  return plan;
}

cudaError_t int8_mm(const Int8Mm& args, const Int8MmPlan& plan, const Device& device, void* workspace,
                    cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  Carver carver(workspace);
  const Int8MmWorkspace pieces = carve(args, plan.gemm, plan.copies_q, carver);
  Output output = {};
  output.data = args.out;
  output.dtype = Dtype::kInt32;
  output.m = args.m;
  output.n = args.n;
  Gemm product = {args.q, args.weight, padded_k(args.k), args.m, args.n, args.k, output};

  cudaError_t error = cudaSuccess;
  if (plan.copies_q) {
    const size_t k = static_cast<size_t>(args.k), row = static_cast<size_t>(product.row_bytes);
    const size_t m = static_cast<size_t>(args.m);
    product.q = pieces.q;
    error = cudaMemcpy2DAsync(pieces.q, row, args.q, k, k, m, cudaMemcpyDeviceToDevice, stream);
    if (error == cudaSuccess && row > k) error = cudaMemset2DAsync(pieces.q + k, row, 0, row - k, m, stream);
  }
  if (error == cudaSuccess && plan.gemm.parts > 1) {
    error = cudaMemsetAsync(pieces.gemm_workspace, 0, counter_bytes(plan.gemm, shape_of(args)), stream);
  }
  if (error != cudaSuccess) return error;
  return gemm(product, plan.gemm, device, pieces.gemm_workspace, false, stream);
}

}  // namespace dynquant::cuda
