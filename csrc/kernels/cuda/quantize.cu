// Ranges, qparams, quantization, rotation: memory-bound kernels that load 16 bytes at a time, each row once.
#include "quantize.h"

#include <algorithm>

#include "launch.h"
#include "row_chunk.cuh"

namespace dynquant::cuda {
namespace {

// Groups of fewer than 128 threads share a block; a larger group is a block.
template <int kThreads>
constexpr int kBlockSize = kThreads < 128 ? 128 : kThreads;

constexpr int kFlatThreads = 256;
constexpr int kElementsPerFlatThread = 16;

// Treats x as one long row; rotation blocks do not cross rows, since they divide k.
template <class T, bool kAny>
__global__ void __launch_bounds__(kFlatThreads, kAny ? 4 : 6)
    range_kernel(const T* x, int64_t count, bool aligned, Rotation rotation, Range* ranges) {
  ptx::let_next_kernel_start();
  using Part = Chunk<T, kFlatThreads, kElementsPerFlatThread, kAny>;
  Range range = {0.0f, 0.0f};
  for (int64_t start = int64_t{blockIdx.x} * Part::kElements; start < count;
       start += int64_t{gridDim.x} * Part::kElements) {
    Part part;
    part.load(x + start, within<Part>(count, start), aligned, rotation);
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

// The sign of a minimum of +0 and -0 depends on the order; adding +0 makes it +0.
__device__ __forceinline__ void write_range(const Range& range, float* lo, float* hi) {
  *lo = range.lo + 0.0f;
  *hi = range.hi + 0.0f;
}

__global__ void __launch_bounds__(kFlatThreads)
    merge_ranges_kernel(const Range* ranges, int count, float* lo, float* hi) {
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
    const QParams qparams = choose(Range{lo[i], hi[i]});
    scale[i] = qparams.scale;
    zero_point[i] = qparams.zero_point;
  }
}

// ---- quantization ----

// The start of both kernels below. The wait comes first: the next kernel reads weights before its own wait,
// so every kernel that may have written them must have ended before the next one starts.
__device__ __forceinline__ void start_quantization(const QuantizeRows& a) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < a.counter_count; i += blockDim.x) {
      a.counters[i] = 0;
    }
  }
}

__device__ __forceinline__ QParams qparams_of(const QuantizeRows& a, const Range& range, int64_t row) {
  if (a.from == QParamsFrom::kRow || a.from == QParamsFrom::kRanges) return choose(range);
  const int64_t i = a.given_per_row ? row : 0;
  return is_finite(range) ? QParams{a.given_scale[i], a.given_zero_point[i]} : no_qparams();
}

__device__ __forceinline__ Quantizer quantizer_for(const QuantizeRows& a, const QParams& qparams) {
  return quantizer_of(qparams, a.from == QParamsFrom::kRow || a.from == QParamsFrom::kRanges);
}

// Elements of a row that a thread of quantize_held_kernel holds in registers.
constexpr int kHeldPerThread = 32;

// A group of kThreads threads holds a row in registers: x and q aligned, no rotation, k <= 32 * kThreads. Its
// limit is the number of instructions: with 25 per element it took 1.4 times as long as a copy of equal size.
template <class T, int kThreads>
__global__ void __launch_bounds__(kBlockSize<kThreads>, (sizeof(T) == 2 ? 1280 : 1024) / kBlockSize<kThreads>)
    quantize_held_kernel(const __grid_constant__ QuantizeRows a) {
  using Part = Chunk<T, kThreads, kHeldPerThread, false>;
  constexpr int kRows = kBlockSize<kThreads> / kThreads;
  start_quantization(a);
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kThreads;
  const bool inside = row < a.x.m;  // a group without a row still takes part in the block's barriers
  const int k = inside ? static_cast<int>(a.x.k) : 0;
  Part part;
  part.load(static_cast<const T*>(a.x.data) + (inside ? row : 0) * a.x.k, k, true, kNoRotation);
  Range range = {0.0f, 0.0f};
  if (a.from == QParamsFrom::kRanges) {
    range = widen_all<kThreads>(a.ranges, a.range_count);
  } else {
    part.widen_range(range);
    range = widen_across_group<kThreads>(range);
  }
  if (!inside) return;
  const QParams qparams = qparams_of(a, range, row);
  if (threadIdx.x % kThreads == 0 && (a.from != QParamsFrom::kRanges || row == 0)) {
    a.scale[row] = qparams.scale;
    a.zero_point[row] = qparams.zero_point;
  }
  const int bytes = static_cast<int>(a.row_bytes);
  store_chunk(part, quantizer_for(a, qparams), a.q + row * bytes, k, bytes, true);
}

// Elements that a thread of quantize_any_kernel holds; that kernel accepts any rows.
template <int kThreads>
constexpr int kElementsPerThread = kThreads == kWarp ? 32 : 16;

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlockSize<kThreads>, kThreads == kWarp ? 5 : 1024 / kThreads)
    quantize_any_kernel(const __grid_constant__ QuantizeRows a, bool x_aligned, bool q_aligned) {
  using Part = Chunk<T, kThreads, kElementsPerThread<kThreads>, true>;
  constexpr int kRows = kBlockSize<kThreads> / kThreads;
  start_quantization(a);
  const bool scan = a.from == QParamsFrom::kRow || a.from == QParamsFrom::kStatic;
  Range tensor_range = {0.0f, 0.0f};
  if (a.from == QParamsFrom::kRanges) tensor_range = widen_all<kThreads>(a.ranges, a.range_count);

  const int64_t k = a.x.k;
  const bool in_registers = scan && k <= Part::kElements;
  const bool leader = threadIdx.x % kThreads == 0;
  for (int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kThreads; row < a.x.m;
       row += int64_t{gridDim.x} * kRows) {
    const T* x = static_cast<const T*>(a.x.data) + row * k;
    Part part;
    Range range = tensor_range;
    if (scan) {
      for (int64_t start = 0; start < k; start += Part::kElements) {
        part.load(x + start, within<Part>(k, start), x_aligned, a.x.rotation);
        part.widen_range(range);
      }
      range = widen_across_group<kThreads>(range);
    }
    if (a.lo != nullptr) {
      if (leader) write_range(range, a.lo + row, a.hi + row);
      continue;
    }
    const QParams qparams = qparams_of(a, range, row);
    if (leader && (scan || (a.from == QParamsFrom::kRanges && row == 0))) {
      a.scale[row] = qparams.scale;
      a.zero_point[row] = qparams.zero_point;
    }
    const Quantizer quantizer = quantizer_for(a, qparams);
    int8_t* const q = a.q + row * a.row_bytes;
    for (int64_t start = 0; start < a.row_bytes; start += Part::kElements) {
      const int count = within<Part>(k, start);
      if (!in_registers) part.load(x + start, count, x_aligned, a.x.rotation);
      store_chunk(part, quantizer, q + start, count, within<Part>(a.row_bytes, start), q_aligned);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kFlatThreads, 4)
    rotate_kernel(const T* x, int64_t count, bool aligned, Rotation rotation, float* out) {
  using Part = Chunk<T, kFlatThreads, kElementsPerFlatThread, true>;
  for (int64_t start = int64_t{blockIdx.x} * Part::kElements; start < count;
       start += int64_t{gridDim.x} * Part::kElements) {
    Part part;
    part.load(x + start, within<Part>(count, start), aligned, rotation);
#pragma unroll
    for (int i = 0; i < Part::kVectors; ++i) {
      const int64_t first = start + Part::first_of(i);
      float v[kVector<T>];
      part.vector(i, v);
#pragma unroll
      for (int j = 0; j < kVector<T>; j += 4) {
        if (first + j + 4 <= count) {
          *reinterpret_cast<float4*>(out + first + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
        } else {
#pragma unroll
          for (int l = 0; l < 4; ++l) {
            if (first + j + l < count) out[first + j + l] = v[j + l];
          }
        }
      }
    }
  }
}

// ---- launches ----

constexpr size_t kReductionBytes = kWarp * sizeof(Range);

int64_t flat_blocks(int64_t count, const Device& device) {
  const int64_t chunks = ceil_div(count, kFlatThreads * kElementsPerFlatThread);
  return std::min<int64_t>({chunks, device.multiprocessors * int64_t{6}, kMaxRanges});
}

template <class T>
bool has_vectors(const T* x, int64_t count) {
  return is_aligned(x) && count * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class T, int kThreads>
cudaError_t launch_held(const QuantizeRows& args, bool overlap, cudaStream_t stream) {
  constexpr int kBlock = kBlockSize<kThreads>;
  Launch spec{dim3(static_cast<unsigned>(ceil_div(args.x.m, kBlock / kThreads))), kBlock, kReductionBytes};
  spec.overlap = overlap;
  return launch<quantize_held_kernel<T, kThreads>>(spec, stream, args);
}

template <class T, int kThreads>
cudaError_t launch_any(const QuantizeRows& args, const Device& device, bool overlap, cudaStream_t stream) {
  constexpr int kBlock = kBlockSize<kThreads>;
  const int64_t wanted = ceil_div(args.x.m, kBlock / kThreads);
  const int64_t resident = device.multiprocessors * int64_t{2048 / kBlock};
  const bool q_aligned = is_aligned(args.q) && args.row_bytes % 16 == 0;
  Launch spec{dim3(static_cast<unsigned>(std::min(wanted, resident))), kBlock, kReductionBytes};
  spec.overlap = overlap;
  return launch<quantize_any_kernel<T, kThreads>>(
      spec, stream, args, has_vectors(static_cast<const T*>(args.x.data), args.x.k), q_aligned);
}

template <class T>
cudaError_t launch_quantize(const QuantizeRows& args, const Device& device, bool overlap,
                            cudaStream_t stream) {
  const int64_t k = args.x.k;
  const bool held = has_vectors(static_cast<const T*>(args.x.data), k) && args.x.rotation.block <= 1 &&
                    args.lo == nullptr && args.from != QParamsFrom::kGiven && is_aligned(args.q) &&
                    args.row_bytes % 16 == 0 && args.x.m < int64_t{1} << 31;
  if (held) {
    if (k <= 32 * kHeldPerThread) return launch_held<T, 32>(args, overlap, stream);
    if (k <= 64 * kHeldPerThread) return launch_held<T, 64>(args, overlap, stream);
    if (k <= 128 * kHeldPerThread) return launch_held<T, 128>(args, overlap, stream);
    if (k <= 256 * kHeldPerThread) return launch_held<T, 256>(args, overlap, stream);
    if (k <= 512 * kHeldPerThread) return launch_held<T, 512>(args, overlap, stream);
  }
  if (k <= 32 * kElementsPerThread<32>) return launch_any<T, 32>(args, device, overlap, stream);
  if (k <= 128 * kElementsPerThread<128>) return launch_any<T, 128>(args, device, overlap, stream);
  if (k <= 256 * kElementsPerThread<256>) return launch_any<T, 256>(args, device, overlap, stream);
  if (k <= 512 * kElementsPerThread<512>) return launch_any<T, 512>(args, device, overlap, stream);
  return launch_any<T, 1024>(args, device, overlap, stream);
}

}  // namespace

cudaError_t current_device(Device* device) {
  // Called for every op: each thread caches its last answer.
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
  // All files except gemm_wgmma_sm90.cu are compiled for the same architectures, so any kernel will do.
  cudaFuncAttributes attributes = {};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, choose_qparams_kernel);
  device->code = attributes.ptxVersion;
  if (error == cudaSuccess) {
    known_index = index;
    known = *device;
  }
  return error;
}

cudaError_t find_ranges(const Rows& x, const Device& device, Range* ranges, int* count, cudaStream_t stream) {
  const int64_t elements = x.m * x.k;
  *count = static_cast<int>(flat_blocks(elements, device));
  if (*count == 0) return cudaSuccess;
  return with_element_type(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Launch spec{dim3(*count), kFlatThreads, kReductionBytes};
    const T* const first = static_cast<const T*>(x.data);
    const bool aligned = has_vectors(first, elements);
    if (x.rotation.block > 1 || !aligned) {
      return launch<range_kernel<T, true>>(spec, stream, first, elements, aligned, x.rotation, ranges);
    }
    return launch<range_kernel<T, false>>(spec, stream, first, elements, true, kNoRotation, ranges);
  });
}

cudaError_t quantize_rows(const QuantizeRows& args, const Device& device, bool overlap, cudaStream_t stream) {
  if (args.x.m == 0) return cudaSuccess;
  return with_element_type(args.x.dtype, [&](auto element) {
    return launch_quantize<decltype(element)>(args, device, overlap, stream);
  });
}

cudaError_t min_max_rows(const Rows& x, float* lo, float* hi, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  QuantizeRows args = {};
  args.x = x;
  args.from = QParamsFrom::kRow;
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
  error = find_ranges(x, device, ranges, &count, stream);
  if (error != cudaSuccess) return error;
  Launch spec{dim3(1), kFlatThreads, kReductionBytes};
  spec.overlap = kernels_overlap(device) && count > 0;
  return launch<merge_ranges_kernel>(spec, stream, ranges, count, lo, hi);
}

cudaError_t choose_qparams(const float* lo, const float* hi, int64_t count, float* scale, int32_t* zero_point,
                           cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(ceil_div(count, kFlatThreads), 1024);
  const Launch spec{dim3(static_cast<unsigned>(blocks)), kFlatThreads};
  return launch<choose_qparams_kernel>(spec, stream, lo, hi, count, scale, zero_point);
}

cudaError_t quantize(const Rows& x, const float* scale, const int32_t* zero_point, bool per_row, int8_t* q,
                     cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  QuantizeRows args = {};
  args.x = x;
  args.from = QParamsFrom::kGiven;
  args.given_scale = scale;
  args.given_zero_point = zero_point;
  args.given_per_row = per_row;
  args.q = q;
  args.row_bytes = x.k;
  return quantize_rows(args, device, false, stream);
}

cudaError_t rotate(const Rows& x, float* out, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess || x.m * x.k == 0) return error;
  const int64_t count = x.m * x.k;
  return with_element_type(x.dtype, [&](auto element) {
    using T = decltype(element);
    const Launch spec{dim3(static_cast<unsigned>(flat_blocks(count, device))), kFlatThreads};
    const T* const first = static_cast<const T*>(x.data);
    return launch<rotate_kernel<T>>(spec, stream, first, count, has_vectors(first, count), x.rotation, out);
  });
}

}  // namespace dynquant::cuda
