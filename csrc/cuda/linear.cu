// Whole products: which kernels run, in which order, and where their intermediate results stand in the workspace.
#include "gemm.h"
#include "launch.h"
#include "quantize.h"

namespace dynquant::cuda {
namespace {

// Hands out pieces of a workspace; with a null workspace it only counts.
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
  size_t bytes;
  int8_t* q;
  float* scale;
  int32_t* zero_point;
  Range* ranges;
  char* of_gemm;
};

GemmShape shape_of(const Linear& args) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && args.x.k % 16 == 0;
  return {args.x.m, args.n, args.x.k, aligned};
}

bool finds_ranges(const Linear& args) { return args.config.per_tensor && args.scale == nullptr; }

LinearWorkspace carve(const Linear& args, const GemmPlan& plan, void* workspace) {
  Carver carver(workspace);
  LinearWorkspace pieces = {};
  const int64_t rows = finds_ranges(args) ? 1 : args.x.m;
  pieces.q = carver.take<int8_t>(args.x.m * round_up(args.x.k, 16));
  pieces.scale = carver.take<float>(rows);
  pieces.zero_point = carver.take<int32_t>(rows);
  pieces.ranges = carver.take<Range>(finds_ranges(args) ? kMaxRanges : 0);
  pieces.of_gemm = carver.take<char>(static_cast<int64_t>(workspace_bytes(plan, shape_of(args))));
  pieces.bytes = carver.used();
  return pieces;
}

struct Int8MmWorkspace {
  size_t bytes;
  int8_t* q;  // null: q is read where it is
  char* of_gemm;
};

GemmShape shape_of(const Int8Mm& args) {
  return {args.m, args.n, args.k, reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && args.k % 16 == 0};
}

bool needs_copy(const Int8Mm& args) {
  return args.k % 16 != 0 || reinterpret_cast<uintptr_t>(args.q) % 16 != 0;
}

Int8MmWorkspace carve(const Int8Mm& args, const GemmPlan& plan, void* workspace) {
  Carver carver(workspace);
  Int8MmWorkspace pieces = {};
  if (needs_copy(args)) pieces.q = carver.take<int8_t>(args.m * round_up(args.k, 16));
  pieces.of_gemm = carver.take<char>(static_cast<int64_t>(workspace_bytes(plan, shape_of(args))));
  pieces.bytes = carver.used();
  return pieces;
}

}  // namespace

cudaError_t gemm(const Gemm& args, const GemmPlan& plan, const Device& device, void* workspace, bool overlap,
                 cudaStream_t stream) {
  PartialSums partial = {};
  if (plan.parts > 1) {
    const GemmShape shape = {args.m, args.n, args.k, is_aligned_weight(args)};
    partial.counters = static_cast<int32_t*>(workspace);
    partial.sums = reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + counter_bytes(plan, shape));
  }
  switch (plan.kernel) {
    case GemmKernel::kSmallDp4a: return gemm_small_dp4a(args, plan, partial, overlap, stream);
    case GemmKernel::kSmallMma: return gemm_small_mma(args, plan, partial, overlap, stream);
    case GemmKernel::kMma: return gemm_mma(args, plan, partial, overlap, stream);
    default: return gemm_wgmma(args, plan, device, overlap, stream);
  }
}

size_t workspace_size(const Linear& args, const Device& device) {
  return carve(args, plan_gemm(shape_of(args), device), nullptr).bytes;
}

cudaError_t linear(const Linear& args, const Device& device, void* workspace, cudaStream_t stream) {
  if (args.x.m == 0 || args.n == 0) return cudaSuccess;
  const GemmShape shape = shape_of(args);
  const GemmPlan plan = plan_gemm(shape, device);
  const LinearWorkspace pieces = carve(args, plan, workspace);
  const bool overlap = kernels_overlap(device);

  QuantizeRows rows = {};
  rows.x = args.x;
  rows.rotation_block = args.config.rotation_block;
  rows.from = args.scale != nullptr ? QparamsFrom::kStatic
              : finds_ranges(args)  ? QparamsFrom::kRanges
                                    : QparamsFrom::kRow;
  rows.given_scale = args.scale;
  rows.given_zero_point = args.zero_point;
  rows.q = pieces.q;
  rows.row_bytes = round_up(args.x.k, 16);
  rows.scale = pieces.scale;
  rows.zero_point = pieces.zero_point;
  rows.counters = reinterpret_cast<int32_t*>(pieces.of_gemm);
  rows.counter_count = static_cast<int64_t>(counter_bytes(plan, shape) / sizeof(int32_t));

  cudaError_t error = cudaSuccess;
  if (finds_ranges(args)) {
    error = find_ranges(args.x, rows.rotation_block, device, pieces.ranges, &rows.range_count, stream);
    rows.ranges = pieces.ranges;
  }
  if (error == cudaSuccess) error = quantize_rows(rows, device, overlap && rows.range_count > 0, stream);
  if (error != cudaSuccess) return error;

  Gemm product = {};
  product.q = pieces.q;
  product.q_row_bytes = rows.row_bytes;
  product.weight = args.weight;
  product.m = args.x.m;
  product.n = args.n;
  product.k = args.x.k;
  product.output = Output{args.out,
                          args.out_dtype,
                          args.x.m,
                          args.n,
                          pieces.scale,
                          pieces.zero_point,
                          finds_ranges(args) ? 0 : 1,
                          args.weight_scale,
                          args.weight_sum,
                          args.bias,
                          args.config.epilogue};
  return gemm(product, plan, device, pieces.of_gemm, overlap, stream);
}

size_t workspace_size(const Int8Mm& args, const Device& device) {
  return carve(args, plan_gemm(shape_of(args), device), nullptr).bytes;
}

cudaError_t int8_mm(const Int8Mm& args, const Device& device, void* workspace, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  const GemmShape shape = shape_of(args);
  const GemmPlan plan = plan_gemm(shape, device);
  const Int8MmWorkspace pieces = carve(args, plan, workspace);
  Gemm product = {};
  product.q = args.q;
  product.q_row_bytes = round_up(args.k, 16);
  product.weight = args.weight;
  product.m = args.m;
  product.n = args.n;
  product.k = args.k;
  product.output.data = args.out;
  product.output.dtype = DType::kInt32;
  product.output.m = args.m;
  product.output.n = args.n;

  cudaError_t error = cudaSuccess;
  if (needs_copy(args)) {
    const size_t k = static_cast<size_t>(args.k), row = static_cast<size_t>(product.q_row_bytes);
    const size_t m = static_cast<size_t>(args.m);
    product.q = pieces.q;
    error = cudaMemcpy2DAsync(pieces.q, row, args.q, k, k, m, cudaMemcpyDeviceToDevice, stream);
    if (error == cudaSuccess && row > k) error = cudaMemset2DAsync(pieces.q + k, row, 0, row - k, m, stream);
  }
  if (error == cudaSuccess && plan.parts > 1) {
    error = cudaMemsetAsync(pieces.of_gemm, 0, counter_bytes(plan, shape), stream);
  }
  if (error != cudaSuccess) return error;
  return gemm(product, plan, device, pieces.of_gemm, false, stream);
}

}  // namespace dynquant::cuda
