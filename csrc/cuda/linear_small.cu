// A whole forward of up to 4 rows in one kernel. Every block quantizes x into its own shared memory, while its first
// weights are on their way: x is a few kilobytes that L2 holds, and a second launch would cost more than reading them
// once a block.
#include "gemm_small_m.cuh"
#include "linear_small.h"
#include "row_chunk.cuh"

namespace dynquant::cuda {
namespace {

struct Args {
  Gemm product;  // its q, and its output's scale and zero_point, are found by each block
  Rows x;
  int rotation_block;
  bool per_tensor;
  const float* given_scale;  // [1], or null
  const int32_t* given_zero_point;
};

template <class Dot>
struct Shared {
  SmallShared<Dot> tile;
  Range ranges[kSmallWarps][Dot::kTileM];
  float scale[Dot::kTileM];
  int32_t zero_point[Dot::kTileM];
  alignas(16) int8_t q[16];  // [x.m, row_bytes]; the launch gives the rest

  static size_t bytes(int64_t m, int64_t row_bytes) {
    return sizeof(Shared) + static_cast<size_t>(m * row_bytes);
  }
};

template <class T, class Dot>
__device__ __forceinline__ void quantize_x(const Args& a, Shared<Dot>& shared) {
  using Part = Chunk<T, kSmallThreads>;
  constexpr int kRows = Dot::kTileM;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t k = a.x.k;
  const int rows = static_cast<int>(a.x.m);
  const auto row_of_x = [&](int row) { return static_cast<const T*>(a.x.data) + row * k; };

  Part part;
  Range range[kRows] = {};
  for (int64_t start = 0; start < k; start += Part::kElements) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {  // the last row again instead of those that are not there
      part.load_aligned(row_of_x(row < rows ? row : rows - 1), start, k, a.rotation_block);
      part.widen_range(range[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    range[row] = widen_across_lanes<kWarp>(range[row]);
    if (lane == 0) shared.ranges[warp][row] = range[row];
  }
  __syncthreads();  // the ranges of all warps are there
  Range of_tensor = {0.0f, 0.0f};
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    range[row] = widen_across_lanes<kSmallWarps>(shared.ranges[lane % kSmallWarps][row]);
    widen(of_tensor, range[row]);
  }

#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    // Chosen number by number: a choice between two structs would put both into local memory.
    const Range chosen = {a.per_tensor ? of_tensor.lo : range[row].lo,
                          a.per_tensor ? of_tensor.hi : range[row].hi};
    Qparams qparams = choose(chosen);
    if (a.given_scale != nullptr) {
      qparams = is_finite(range[row]) ? Qparams{*a.given_scale, *a.given_zero_point} : no_qparams();
    }
    if (threadIdx.x == row) {
      shared.scale[row] = qparams.scale;
      shared.zero_point[row] = qparams.zero_point;
    }
    const float inverse_scale = 1.0f / qparams.scale;
#pragma unroll 1
    for (int64_t start = 0; row < rows && start < a.product.row_bytes; start += Part::kElements) {
      const bool in_registers = kRows == 1 && k <= Part::kElements;
      if (!in_registers) part.load_aligned(row_of_x(row), start, k, a.rotation_block);
#pragma unroll
      for (int i = 0; i < Part::kVectors; ++i) {
        store_vector(part.v[i], qparams, inverse_scale, shared.q + row * a.product.row_bytes,
                     Part::first_of(start, i), k, a.product.row_bytes, true);
      }
    }
  }
  __syncthreads();  // q is there
}

template <class T, class Dot>
__global__ void __launch_bounds__(kSmallThreads, Dot::kResident)
    linear_small_kernel(const __grid_constant__ Args a) {
  auto& shared = *ptx::dynamic_shared<Shared<Dot>>();
  const int64_t n = blockIdx.x * int64_t{Dot::kTileN};
  const int row_bytes = static_cast<int>(a.product.row_bytes);
  const int last_row = static_cast<int>(a.x.m) - 1;
  sum_small_tile<Dot>(
      a.product, n, 0, a.product.k, shared.tile, [&] { quantize_x<T>(a, shared); },
      [&](int i, int k) {
        return *reinterpret_cast<const uint4*>(shared.q + (i < last_row ? i : last_row) * row_bytes + k);
      });
  Output output = a.product.output;
  output.scale = shared.scale;
  output.zero_point = shared.zero_point;
  output.row_stride = 1;
  finish_tile<kSmallThreads, Dot::kTileM, Dot::kTileN>(
      output, 0, n, 1, 0, 0, nullptr, nullptr, shared.tile.columns,
      [&](int row, int group, int32_t (&values)[kGroup]) { shared.tile.load(row, group, values); });
}

template <class Dot>
cudaError_t launch_linear_small(const Args& args, cudaStream_t stream) {
  const Launch how{dim3(static_cast<unsigned>(ceil_div(args.product.n, Dot::kTileN))), kSmallThreads,
                   Shared<Dot>::bytes(args.x.m, args.product.row_bytes)};
  return with_element_type(args.x.dtype, [&](auto element) {
    return launch<linear_small_kernel<decltype(element), Dot>>(how, stream, args);
  });
}

}  // namespace

cudaError_t linear_small(const Linear& args, const Output& output, cudaStream_t stream) {
  Args a = {};
  a.product.weight = args.weight;
  a.product.row_bytes = padded_k(args.x.k);
  a.product.m = args.x.m;
  a.product.n = args.n;
  a.product.k = args.x.k;
  a.product.output = output;
  a.x = args.x;
  a.rotation_block = args.config.rotation_block;
  a.per_tensor = args.config.per_tensor;
  a.given_scale = args.scale;
  a.given_zero_point = args.zero_point;
  return args.x.m == 1 ? launch_linear_small<Dp4a<1>>(a, stream) : launch_linear_small<Dp4a<4>>(a, stream);
}

}  // namespace dynquant::cuda
