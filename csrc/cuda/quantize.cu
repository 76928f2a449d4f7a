// Ranges, qparams, quantization, rotation: what is bound by memory, reads 16 bytes at a time, and each row once.
#include "quantize.h"

#include <algorithm>

#include "launch.h"
#include "row_chunk.cuh"

namespace dynquant::cuda {
namespace {

// A warp shares its block with others; a larger group is a block.
template <int kThreads>
constexpr int kBlockSize = kThreads == kWarp ? 128 : kThreads;

// Blocks that a multiprocessor shall hold at least: 64 registers a thread, up to 102 where a warp has a row for
// itself (at 80 it spills for some architectures).
template <int kThreads>
constexpr int kResident = kThreads == kWarp ? 5 : 1024 / kThreads;

constexpr int kFlatThreads = 256;

// x as one long row; a rotation's blocks do not care, since they divide k.
template <class T>
__global__ void __launch_bounds__(kFlatThreads, kResident<kFlatThreads>)
    range_kernel(const T* x, int64_t count, bool aligned, int block, Range* ranges) {
  ptx::let_next_kernel_start();
  using Part = Chunk<T, kFlatThreads>;
  Range range = {0.0f, 0.0f};
  for (int64_t start = blockIdx.x * Part::kElements; start < count; start += gridDim.x * Part::kElements) {
    Part part;
    part.load(x, start, count, aligned, block);
    part.widen_range(range);
  }
  range = widen_across_group<kFlatThreads>(range);
  if (threadIdx.x == 0) ranges[blockIdx.x] = range;
}

template <int kThreads>
__device__ __forceinline__ Range widen_all(const Range* ranges, int count) {
  Range range = {0.0f, 0.0f};
  for (int i = threadIdx.x % kThreads; i < count; i += kThreads) {
    widen(range, ranges[i]);
  }
  return widen_across_group<kThreads>(range);
}

// A minimum of +0 and -0 may be either; the result is always +0.
__device__ __forceinline__ void write_range(const Range& range, float* lo, float* hi) {
  *lo = range.lo + 0.0f;
  *hi = range.hi + 0.0f;
}

__global__ void __launch_bounds__(kFlatThreads)
    join_ranges_kernel(const Range* ranges, int count, float* lo, float* hi) {
  ptx::wait_for_previous_kernel();
  const Range range = widen_all<kFlatThreads>(ranges, count);
  if (threadIdx.x == 0) write_range(range, lo, hi);
}

// ---- qparams ----

__global__ void __launch_bounds__(kFlatThreads)
    choose_qparams_kernel(const float* lo, const float* hi, int64_t count, float* scale,
                          int32_t* zero_point) {
  for (int64_t i = blockIdx.x * int64_t{kFlatThreads} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{kFlatThreads}) {
    const Qparams qparams = choose(Range{lo[i], hi[i]});
    scale[i] = qparams.scale;
    zero_point[i] = qparams.zero_point;
  }
}

// ---- quantization ----

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlockSize<kThreads>, kResident<kThreads>)
    quantize_kernel(const QuantizeRows a, bool x_aligned, bool q_aligned) {
  using Part = Chunk<T, kThreads>;
  constexpr int kRows = kBlockSize<kThreads> / kThreads;
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < a.counter_count; i += blockDim.x) {
      a.counters[i] = 0;
    }
  }
  const bool scan = a.from == QparamsFrom::kRow || a.from == QparamsFrom::kStatic;
  Range of_tensor = {0.0f, 0.0f};
  if (a.from == QparamsFrom::kRanges) of_tensor = widen_all<kThreads>(a.ranges, a.range_count);

  const int64_t k = a.x.k;
  const bool leader = threadIdx.x % kThreads == 0;
  for (int64_t row = blockIdx.x * int64_t{kRows} + threadIdx.x / kThreads; row < a.x.m;
       row += gridDim.x * int64_t{kRows}) {
    const T* x = static_cast<const T*>(a.x.data) + row * k;
    Part part;
    Range range = of_tensor;
    if (scan) {
      for (int64_t start = 0; start < k; start += Part::kElements) {
        part.load(x, start, k, x_aligned, a.rotation_block);
        part.widen_range(range);
      }
      range = widen_across_group<kThreads>(range);
    }
    if (a.lo != nullptr) {
      if (leader) write_range(range, a.lo + row, a.hi + row);
      continue;
    }
    Qparams qparams;
    if (a.from == QparamsFrom::kRow || a.from == QparamsFrom::kRanges) {
      qparams = choose(range);
    } else {
      const int64_t i = a.given_per_row ? row : 0;
      qparams = is_finite(range) ? Qparams{a.given_scale[i], a.given_zero_point[i]} : no_qparams();
    }
    if (leader && (scan || (a.from == QparamsFrom::kRanges && row == 0))) {
      a.scale[row] = qparams.scale;
      a.zero_point[row] = qparams.zero_point;
    }
    const float inverse_scale = 1.0f / qparams.scale;
    for (int64_t start = 0; start < a.row_bytes; start += Part::kElements) {
      const bool in_registers = scan && k <= Part::kElements;
      if (!in_registers) part.load(x, start, k, x_aligned, a.rotation_block);
#pragma unroll
      for (int i = 0; i < Part::kVectors; ++i) {
        store_vector(part.v[i], qparams, inverse_scale, a.q + row * a.row_bytes, Part::first_of(start, i), k,
                     a.row_bytes, q_aligned);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kFlatThreads, kResident<kFlatThreads>)
    rotate_kernel(const T* x, int64_t count, bool aligned, int block, float* out) {
  using Part = Chunk<T, kFlatThreads>;
  for (int64_t start = blockIdx.x * Part::kElements; start < count; start += gridDim.x * Part::kElements) {
    Part part;
    part.load(x, start, count, aligned, block);
#pragma unroll
    for (int i = 0; i < Part::kVectors; ++i) {
      const int64_t first = Part::first_of(start, i);
#pragma unroll
      for (int j = 0; j < kVector<T>; j += 4) {
        if (first + j + 4 <= count) {
          *reinterpret_cast<float4*>(out + first + j) =
              make_float4(part.v[i][j], part.v[i][j + 1], part.v[i][j + 2], part.v[i][j + 3]);
        } else {
#pragma unroll
          for (int l = 0; l < 4; ++l) {
            if (first + j + l < count) out[first + j + l] = part.v[i][j + l];
          }
        }
      }
    }
  }
}

// ---- launches ----

constexpr size_t kReductionBytes = kWarp * sizeof(Range);

int64_t flat_blocks(int64_t count, const Device& device) {
  const int64_t chunks = ceil_div(count, kRowOf<kFlatThreads>);
  return std::min<int64_t>({chunks, device.multiprocessors * int64_t{8}, kMaxRanges});
}

template <int kThreads>
cudaError_t launch_quantize(const QuantizeRows& args, const Device& device, bool overlap,
                            cudaStream_t stream) {
  return with_element_type(args.x.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kBlock = kBlockSize<kThreads>;
    const int64_t wanted = ceil_div(args.x.m, kBlock / kThreads);
    const int64_t resident = device.multiprocessors * int64_t{2048 / kBlock};
    const bool x_aligned = is_aligned(args.x.data) && args.x.k * sizeof(T) % 16 == 0;
    const bool q_aligned = is_aligned(args.q) && args.row_bytes % 16 == 0;
    Launch how{dim3(static_cast<unsigned>(std::min(wanted, resident))), kBlock, kReductionBytes};
    how.overlap = overlap;
    return launch<quantize_kernel<T, kThreads>>(how, stream, args, x_aligned, q_aligned);
  });
}

}  // namespace

cudaError_t current_device(Device* device) {
  // Asked at every call: the last answer of each thread is kept.
  thread_local int known_index = -1;
  thread_local Device known = {};
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess && index == known_index) {
    *device = known;
    return cudaSuccess;
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  device->capability = 10 * major + minor;
  // All files but the one for wgmma are compiled for the same architectures, so one kernel speaks for all.
  cudaFuncAttributes attributes = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, choose_qparams_kernel);
  device->code = attributes.ptxVersion;
  if (error == cudaSuccess) {
    known_index = index;
    known = *device;
  }
  return error;
}

cudaError_t find_ranges(const Rows& x, int rotation_block, const Device& device, Range* ranges, int* count,
                        cudaStream_t stream) {
  const int64_t elements = x.m * x.k;
  *count = static_cast<int>(flat_blocks(elements, device));
  if (*count == 0) return cudaSuccess;
  return with_element_type(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Launch how{dim3(*count), kFlatThreads, kReductionBytes};
    return launch<range_kernel<T>>(how, stream, static_cast<const T*>(x.data), elements, is_aligned(x.data),
                                   rotation_block, ranges);
  });
}

cudaError_t quantize_rows(const QuantizeRows& args, const Device& device, bool overlap, cudaStream_t stream) {
  if (args.x.m == 0) return cudaSuccess;
  if (args.x.k <= kRowOf<32>) return launch_quantize<32>(args, device, overlap, stream);
  if (args.x.k <= kRowOf<128>) return launch_quantize<128>(args, device, overlap, stream);
  if (args.x.k <= kRowOf<256>) return launch_quantize<256>(args, device, overlap, stream);
  if (args.x.k <= kRowOf<512>) return launch_quantize<512>(args, device, overlap, stream);
  return launch_quantize<1024>(args, device, overlap, stream);
}

cudaError_t min_max_rows(const Rows& x, float* lo, float* hi, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  QuantizeRows args = {};
  args.x = x;
  args.from = QparamsFrom::kRow;
  args.lo = lo;
  args.hi = hi;
  return quantize_rows(args, device, false, stream);
}

cudaError_t min_max_tensor(const Rows& x, float* lo, float* hi, void* workspace, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  Range* ranges = static_cast<Range*>(workspace);
  int count = 0;
  error = find_ranges(x, 0, device, ranges, &count, stream);
  if (error != cudaSuccess) return error;
  Launch how{dim3(1), kFlatThreads, kReductionBytes};
  how.overlap = kernels_overlap(device) && count > 0;
  return launch<join_ranges_kernel>(how, stream, ranges, count, lo, hi);
}

cudaError_t choose_qparams(const float* lo, const float* hi, int64_t count, float* scale, int32_t* zero_point,
                           cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(ceil_div(count, kFlatThreads), 1024);
  const Launch how{dim3(static_cast<unsigned>(blocks)), kFlatThreads};
  return launch<choose_qparams_kernel>(how, stream, lo, hi, count, scale, zero_point);
}

cudaError_t quantize(const Rows& x, const float* scale, const int32_t* zero_point, bool per_row, int8_t* q,
                     cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  QuantizeRows args = {};
  args.x = x;
  args.from = QparamsFrom::kGiven;
  args.given_scale = scale;
  args.given_zero_point = zero_point;
  args.given_per_row = per_row;
  args.q = q;
  args.row_bytes = x.k;
  return quantize_rows(args, device, false, stream);
}

cudaError_t rotate(const Rows& x, int block, float* out, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess || x.m * x.k == 0) return error;
  const int64_t count = x.m * x.k;
  return with_element_type(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Launch how{dim3(static_cast<unsigned>(flat_blocks(count, device))), kFlatThreads};
    return launch<rotate_kernel<T>>(how, stream, static_cast<const T*>(x.data), count, is_aligned(x.data),
                                    block, out);
  });
}

}  // namespace dynquant::cuda
