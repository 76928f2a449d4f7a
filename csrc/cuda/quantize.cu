// Ranges, qparams, quantization, rotation: what is bound by memory, reads 16 bytes at a time, and each row once.
//
// A chunk is what a group of kThreads threads holds of a row in registers. Vector v of thread t (E elements, 16
// bytes) stands at (v * kThreads + t) * E, so that a warp reads 512 neighbouring bytes:
//
//   element   0 ... E-1 | E ... 2E-1 | ...                      | kThreads*E ...
//   thread        0     |     1      | ...   kThreads-1         |     0      ...
//   vector                     0                                |     1
//
// A block of the rotation (at most 128 elements) lies within one vector of neighbouring lanes of one warp.

#include "quantize.h"

#include <algorithm>

#include "launch.h"
#include "ptx.cuh"
#include "unaligned.cuh"

namespace dynquant::cuda {
namespace {

constexpr int kWarp = 32;

// What a thread keeps of a row: a warp alone takes more than its share of a block of 1024 threads could be.
template <int kThreads>
constexpr int kElementsPerThread = kThreads == kWarp ? 32 : 16;

// The longest row that a group of threads holds.
template <int kThreads>
constexpr int64_t kRowOf = kThreads * int64_t{kElementsPerThread<kThreads>};

// A warp shares its block with others; a larger group is a block.
template <int kThreads>
constexpr int kBlockSize = kThreads == kWarp ? 128 : kThreads;

// Blocks that a multiprocessor shall hold at least: 64 registers a thread, up to 102 where a warp has a row for
// itself (at 80 it spills for some architectures).
template <int kThreads>
constexpr int kResident = kThreads == kWarp ? 5 : 1024 / kThreads;

// ---- elements ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) { return ptx::float_from_half(x.bits); }

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&v)[kVector<T>]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = __uint_as_float(word[i]);
    } else {
      v[2 * i] = to_float(T{static_cast<uint16_t>(word[i])});
      v[2 * i + 1] = to_float(T{static_cast<uint16_t>(word[i] >> 16)});
    }
  }
}

// Walsh-Hadamard transform of each `block` elements of neighbouring lanes: strides 1, 2, 4 ... block/2, each
// (a, b) -> (a + b, a - b). Lane l holds elements l*kCount ... l*kCount + kCount-1.
template <int kCount>
__device__ __forceinline__ void transform(float (&v)[kCount], int block) {
#pragma unroll
  for (int stride = 1; stride < kCount; stride *= 2) {
    if (stride < block) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if ((i & stride) == 0) {
          const float a = v[i], b = v[i + stride];
          v[i] = a + b;
          v[i + stride] = a - b;
        }
      }
    }
  }
  for (int lanes = 1; lanes * kCount < block; lanes *= 2) {
    const bool second = (threadIdx.x & lanes) != 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float other = __shfl_xor_sync(~0u, v[i], lanes);
      v[i] = second ? other - v[i] : v[i] + other;
    }
  }
}

// ---- ranges ----

__device__ __forceinline__ void widen(Range& range, const Range& other) {
  range.lo = ptx::min_nan(range.lo, other.lo);
  range.hi = ptx::max_nan(range.hi, other.hi);
}

template <int kLanes>
__device__ __forceinline__ Range widen_across_lanes(Range range) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    widen(range, Range{__shfl_xor_sync(~0u, range.lo, lanes), __shfl_xor_sync(~0u, range.hi, lanes)});
  }
  return range;
}

// The range of a group of kThreads threads (a warp, or the block), in all of them.
template <int kThreads>
__device__ __forceinline__ Range widen_across_group(Range range) {
  range = widen_across_lanes<kWarp>(range);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    Range* of_warp = ptx::dynamic_shared<Range>();
    __syncthreads();  // what the last call left has been read
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = range;
    __syncthreads();
    range = widen_across_lanes<kWarps>(of_warp[threadIdx.x % kWarps]);
  }
  return range;
}

__device__ __forceinline__ bool is_finite(const Range& range) {
  return range.hi <= 3.402823466e38f && range.lo >= -3.402823466e38f;
}

// What a group of kThreads threads holds of a row.
template <class T, int kThreads>
struct Chunk {
  static constexpr int kVectors = kElementsPerThread<kThreads> / kVector<T>;
  static constexpr int64_t kElements = kRowOf<kThreads>;

  float v[kVectors][kVector<T>];

  static __device__ __forceinline__ int64_t first_of(int64_t start, int vector) {
    return start + (vector * kThreads + static_cast<int>(threadIdx.x) % kThreads) * kVector<T>;
  }

  // Elements from `start` on, 0 beyond k, rotated by blocks. `aligned`: the row starts at a multiple of 16 bytes.
  __device__ __forceinline__ void load(const T* row, int64_t start, int64_t k, bool aligned, int block) {
    uint4 raw[kVectors];
    if (aligned && k % kVector<T> == 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int64_t first = first_of(start, i);
        raw[i] = first < k ? ptx::load_once(row + first) : make_uint4(0, 0, 0, 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int64_t first = first_of(start, i);
        raw[i] = first < k ? load_unaligned(row + first, row, row + k) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      unpack<T>(raw[i], v[i]);
      if (block > 1) transform(v[i], block);
    }
  }

  __device__ __forceinline__ void widen_range(Range& range) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        widen(range, Range{v[i][j], v[i][j]});
      }
    }
  }
};

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

struct Qparams {
  float scale;
  int32_t zero_point;
};

__device__ __forceinline__ Qparams no_qparams() { return {__int_as_float(0x7fc00000), 0}; }

__device__ __forceinline__ Qparams choose(const Range& range) {
  if (!is_finite(range)) return no_qparams();
  const float scale = fmaxf(range.hi / 255.0f - range.lo / 255.0f, 1.175494351e-38f);
  const float inverse = 1.0f / scale;
  const float zero_point = rintf(-128.0f - range.lo * inverse);
  return {scale, static_cast<int32_t>(fminf(fmaxf(zero_point, -128.0f), 127.0f))};
}

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

// A float whose lowest byte is the int8.
__device__ __forceinline__ uint32_t quantized(float x, float inverse_scale, float zero_point) {
  const float steps = rintf(x * inverse_scale) + zero_point;
  const float clamped = steps != steps ? 0.0f : fminf(fmaxf(steps, -128.0f), 127.0f);
  return __float_as_uint(clamped +
                         12582912.0f);  // 1.5 * 2^23: the integer moves to the low end of the mantissa
}

__device__ __forceinline__ uint32_t lowest_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// kCount neighbouring elements, zeros beyond k. `aligned`: rows of q start at multiples of 16 bytes, and all of
// row_bytes is written; otherwise k bytes are.
template <int kCount>
__device__ __forceinline__ void store_vector(const float (&v)[kCount], const Qparams& qparams,
                                             float inverse_scale, int8_t* row, int64_t first, int64_t k,
                                             int64_t row_bytes, bool aligned) {
  const float zero_point = static_cast<float>(qparams.zero_point);
  uint32_t q[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    q[i] = quantized(v[i], inverse_scale, zero_point);
  }
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i < k) row[first + i] = static_cast<int8_t>(q[i] & 0xff);
    }
    return;
  }
  if (first >= row_bytes) return;
  if (first + kCount > k) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i >= k) q[i] = 0;
    }
  }
  const uint32_t low = lowest_bytes(q[0], q[1], q[2], q[3]);
  if constexpr (kCount == 8) {
    *reinterpret_cast<uint2*>(row + first) = make_uint2(low, lowest_bytes(q[4], q[5], q[6], q[7]));
  } else {
    *reinterpret_cast<uint32_t*>(row + first) = low;
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kBlockSize<kThreads>, kResident<kThreads>)
    quantize_kernel(const QuantizeRows a, bool x_aligned, bool q_aligned) {
  using Part = Chunk<T, kThreads>;
  constexpr int kRows = kBlockSize<kThreads> / kThreads;
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();

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

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls body(T{}) with the C++ type of x's elements.
template <class Body>
cudaError_t with_element_type(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) return body(float{});
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  return body(Float16{});
}

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
    return launch(quantize_kernel<T, kThreads>, how, stream, args, x_aligned, q_aligned);
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
    return launch(range_kernel<T>, how, stream, static_cast<const T*>(x.data), elements, is_aligned(x.data),
                  rotation_block, ranges);
  });
}

cudaError_t quantize_rows(const QuantizeRows& args, const Device& device, bool overlap, cudaStream_t stream) {
  if (args.x.m == 0) return cudaSuccess;
  if (args.x.k <= kRowOf<32>) return launch_quantize<32>(args, device, overlap, stream);
  if (args.x.k <= kRowOf<128>) return launch_quantize<128>(args, device, overlap, stream);
  if (args.x.k <= kRowOf<256>) return launch_quantize<256>(args, device, overlap, stream);
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
  return launch(join_ranges_kernel, how, stream, ranges, count, lo, hi);
}

cudaError_t choose_qparams(const float* lo, const float* hi, int64_t count, float* scale, int32_t* zero_point,
                           cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(ceil_div(count, kFlatThreads), 1024);
  const Launch how{dim3(static_cast<unsigned>(blocks)), kFlatThreads};
  return launch(choose_qparams_kernel, how, stream, lo, hi, count, scale, zero_point);
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
    return launch(rotate_kernel<T>, how, stream, static_cast<const T*>(x.data), count, is_aligned(x.data),
                  block, out);
  });
}

}  // namespace dynquant::cuda
