// Pieces of the quantization that several kernels share: a part of a row in registers, its range, qparams, int8.
//
// A chunk is what a group of kThreads threads holds of a row in registers. Vector v of thread t (E elements, 16
// bytes) stands at (v * kThreads + t) * E, so that a warp reads 512 neighbouring bytes:
//
//   element   0 ... E-1 | E ... 2E-1 | ...                      | kThreads*E ...
//   thread        0     |     1      | ...   kThreads-1         |     0      ...
//   vector                     0                                |     1
//
// A block of the rotation (at most 128 elements) lies within one vector of neighbouring lanes of one warp.
#pragma once

#include "ptx.cuh"
#include "quantize.h"
#include "unaligned.cuh"

namespace dynquant::cuda {

constexpr int kWarp = 32;

// What a thread keeps of a row: a warp alone takes more than its share of a block of 1024 threads could be.
template <int kThreads>
constexpr int kElementsPerThread = kThreads == kWarp ? 32 : 16;

// The longest row that a group of threads holds.
template <int kThreads>
constexpr int64_t kRowOf = kThreads * int64_t{kElementsPerThread<kThreads>};

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

  // Elements from `start` on, 0 beyond k, rotated by blocks. The row starts at a multiple of 16 bytes, and k elements
  // are one.
  __device__ __forceinline__ void load_aligned(const T* row, int64_t start, int64_t k, int block) {
    load_vectors(row, start, k, block, [](const T* first) { return ptx::load_once(first); });
  }

  // The same of any row.
  __device__ __forceinline__ void load(const T* row, int64_t start, int64_t k, bool aligned, int block) {
    if (aligned && k % kVector<T> == 0) {
      load_aligned(row, start, k, block);
    } else {
      load_vectors(row, start, k, block, [&](const T* first) { return load_unaligned(first, row, row + k); });
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

 private:
  template <class Load>
  __device__ __forceinline__ void load_vectors(const T* row, int64_t start, int64_t k, int block,
                                               const Load& load_16_bytes) {
    uint4 raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t first = first_of(start, i);
      raw[i] = first < k ? load_16_bytes(row + first) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      unpack<T>(raw[i], v[i]);
      if (block > 1) transform(v[i], block);
    }
  }
};

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

// ---- for launches ----

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls body(T{}) with the C++ type of x's elements.
template <class Body>
cudaError_t with_element_type(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) return body(float{});
  if (dtype == DType::kBFloat16) return body(BFloat16{});
  return body(Float16{});
}

}  // namespace dynquant::cuda
