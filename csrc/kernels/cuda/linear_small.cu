// A whole forward pass of up to 4 rows in one kernel. Every block quantizes x, a few kilobytes in L2, into
// its own shared memory while its first weights are in flight.
#include "gemm_small.cuh"
#include "linear_small.h"
#include "row_chunk.cuh"

namespace dynquant::cuda {
namespace {

struct Args {
  Gemm product;  // each block computes q and the output's scale and zero_point
  Rows x;
  bool per_tensor;
  const float* given_scale;  // [1], or null
  const int32_t* given_zero_point;
};

using Dot = Mma<8>;

template <int kRows, bool kRotated>
constexpr int64_t kLongestRow = linear_small_k(kRows, kRotated);

template <int kRows>
struct Shared {
  SmallShared<Dot> tile;
  Range ranges[kSmallWarps];
  float scale[kRows];
  int32_t zero_point[kRows];
  alignas(16) int8_t q[16];  // [x.m, q_stride]; the size is given at launch

  static size_t bytes(int64_t m, int64_t row_bytes) {
    return sizeof(Shared) + static_cast<size_t>(m * q_stride(row_bytes));
  }

  // 64 bytes more than a multiple of 128: neighbouring rows lie in different banks.
  static __host__ __device__ int64_t q_stride(int64_t row_bytes) {
    return (row_bytes + 127) / 128 * 128 + 64;
  }
};

// kRows groups of threads hold a row each, so that the loads of all rows are in flight together.
template <class T, int kRows, bool kRotated>
__device__ __forceinline__ void quantize_x(const Args& a, Shared<kRows>& shared) {
  constexpr int kThreads = kSmallThreads / kRows;
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kElementsPerThread = kRows == 1 || kRotated ? 16 : 32;
  using Part = Chunk<T, kThreads, kElementsPerThread, kRotated>;
  static_assert(Part::kElements == kLongestRow<kRows, kRotated>);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int row = threadIdx.x / kThreads;
  const bool inside = row < a.x.m;
  const int k = inside ? static_cast<int>(a.x.k) : 0;
  const T* const x = static_cast<const T*>(a.x.data) + (inside ? row : 0) * a.x.k;

  Part part;
  Range range = {0.0f, 0.0f};
  part.load(x, k, true, a.x.rotation);
  part.widen_range(range);
  range = widen_across_lanes<kWarp>(range);
  if (lane == 0) shared.ranges[warp] = range;
  __syncthreads();  // the ranges of all warps are written
  range = a.per_tensor ? widen_across_lanes<kSmallWarps>(shared.ranges[lane % kSmallWarps])
                       : widen_across_lanes<kWarps>(shared.ranges[row * kWarps + lane % kWarps]);

  const bool given = a.given_scale != nullptr;
  QParams qparams = choose(range);
  if (given) qparams = is_finite(range) ? QParams{*a.given_scale, *a.given_zero_point} : no_qparams();
  if (inside && threadIdx.x % kThreads == 0) {
    shared.scale[row] = qparams.scale;
    shared.zero_point[row] = qparams.zero_point;
  }
  const Quantizer quantizer = quantizer_of(qparams, !given);
  int8_t* const q = shared.q + row * shared.q_stride(a.product.row_bytes);
  if (inside) store_chunk(part, quantizer, q, k, static_cast<int>(a.product.row_bytes), true);
  __syncthreads();  // q is there
}

template <class T, int kRows, bool kRotated>
__global__ void __launch_bounds__(kSmallThreads, 2) linear_small_kernel(const __grid_constant__ Args a) {
  // Before any read: the previous kernel may write the weights.
  ptx::wait_for_previous_kernel();
  auto& shared = *ptx::dynamic_shared<Shared<kRows>>();
  const int64_t n = blockIdx.x * int64_t{Dot::kTileN};
  const int last_row = static_cast<int>(a.x.m) - 1;
  const int row = min(Dot::q_row(0, threadIdx.x % 32), last_row);
  const int8_t* const q = shared.q + row * shared.q_stride(a.product.row_bytes);
  sum_small_tile<Dot>(
      a.product, n, 0, a.product.k, shared.tile, [&] { quantize_x<T, kRows, kRotated>(a, shared); },
      [&](int, int k) { return *reinterpret_cast<const uint4*>(q + k); });
  Output output = a.product.output;
  output.scale = shared.scale;
  output.zero_point = shared.zero_point;
  output.row_stride = 1;
  finish_tile<kSmallThreads, Dot::kTileM, Dot::kTileN>(
      output, 0, n, 1, 0, 0, nullptr, nullptr, shared.tile.columns,
      [&](int row, int group, int32_t (&values)[kGroup]) { shared.tile.load(row, group, values); });
}

template <int kRows>
cudaError_t launch_linear_small(const Args& args, bool overlap, cudaStream_t stream) {
  Launch spec{dim3(static_cast<unsigned>(ceil_div(args.product.n, Dot::kTileN))), kSmallThreads,
              Shared<kRows>::bytes(args.x.m, args.product.row_bytes)};
  spec.overlap = overlap;
  return with_element_type(args.x.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.x.rotation.block > 1) return launch<linear_small_kernel<T, kRows, true>>(spec, stream, args);
    return launch<linear_small_kernel<T, kRows, false>>(spec, stream, args);
  });
}

}  // namespace

cudaError_t linear_small(const Linear& args, const Output& output, bool overlap, cudaStream_t stream) {
  Args a = {};
  a.product.weight = args.weight;
  a.product.row_bytes = padded_k(args.x.k);
  a.product.m = args.x.m;
  a.product.n = args.n;
  a.product.k = args.x.k;
  a.product.output = output;
  a.x = args.x;
  a.per_tensor = args.config.per_tensor && args.scale == nullptr;
  a.given_scale = args.scale;
  a.given_zero_point = args.zero_point;
  return args.x.m == 1 ? launch_linear_small<1>(a, overlap, stream)
                       : launch_linear_small<4>(a, overlap, stream);
}

}  // namespace dynquant::cuda
