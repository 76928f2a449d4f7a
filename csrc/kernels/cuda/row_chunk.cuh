// Steps of quantization that several kernels share: a part of a row in registers, its range, qparams, int8.
//
// A chunk is the part of a row that a group of kThreads threads holds in registers. Vector v of thread t (E
// elements, 16 bytes) starts at element (v * kThreads + t) * E, so that a warp reads 512 neighbouring bytes:
//
//   element   0 ... E-1 | E ... 2E-1 | ...                      | kThreads*E ...
//   thread        0     |     1      | ...   kThreads-1         |     0      ...
//   vector                     0                                |     1
//
// A block of the rotation (at most 128 elements) lies within one vector of neighbouring lanes of one warp.
#pragma once

#include <type_traits>

#include "ptx.cuh"
#include "quantize.h"
#include "unaligned.cuh"

namespace dynquant::cuda {

constexpr int kWarp = 32;

// ---- elements ----

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

// Element-wise minimum and maximum of words of one float or two 16-bit elements; NaN if an operand is.
template <class T>
__device__ __forceinline__ uint32_t min_of_words(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, BFloat16>) return ptx::min_nan_bfloat16_pair(a, b);
  if constexpr (std::is_same_v<T, Float16>) return ptx::min_nan_half_pair(a, b);
  return __float_as_uint(ptx::min_nan(__uint_as_float(a), __uint_as_float(b)));
}

template <class T>
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, BFloat16>) return ptx::max_nan_bfloat16_pair(a, b);
  if constexpr (std::is_same_v<T, Float16>) return ptx::max_nan_half_pair(a, b);
  return __float_as_uint(ptx::max_nan(__uint_as_float(a), __uint_as_float(b)));
}

constexpr uint32_t rotation_signs(uint32_t first) {
  uint32_t bits = 0;
  for (uint32_t i = 0; i < 32; ++i) bits |= rotation_sign(first + i) >> 31 << i;
  return bits;
}

// The sign bits of the factors of elements kFirst ... kFirst + 31 of a block, lowest bit first.
template <uint32_t kFirst>
constexpr uint32_t kRotationSigns = rotation_signs(kFirst);

// Multiplies elements first ... first + kCount-1 of a row by their factors; `first` is a multiple of kCount.
template <int kCount>
__device__ __forceinline__ void flip_signs(float (&v)[kCount], int first, int block) {
  constexpr uint32_t kSignsOfBlocksOf4 = 0x88888888u;  // the last of each 4; smaller blocks have none
  const int at = first & (block - 1);
  const uint32_t low = at & 32 ? kRotationSigns<32> : kRotationSigns<0>;
  const uint32_t high = at & 32 ? kRotationSigns<96> : kRotationSigns<64>;
  uint32_t signs = (at & 64 ? high : low) >> (at & 31);
  if (block < 8) signs = block == 4 ? kSignsOfBlocksOf4 : 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] = __uint_as_float(__float_as_uint(v[i]) ^ (signs >> i << 31));
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

// The range of a group of kThreads threads, returned to all of them; every group of the block calls this.
template <int kThreads>
__device__ __forceinline__ Range widen_across_group(Range range) {
  range = widen_across_lanes<kWarp>(range);
  if constexpr (kThreads > kWarp) {
    constexpr int kWarps = kThreads / kWarp;
    Range* warp_ranges = ptx::dynamic_shared<Range>();
    __syncthreads();  // the ranges of the previous call have been read
    if (threadIdx.x % kWarp == 0) warp_ranges[threadIdx.x / kWarp] = range;
    __syncthreads();
    range = widen_across_lanes<kWarps>(warp_ranges[threadIdx.x / kThreads * kWarps + threadIdx.x % kWarps]);
  }
  return range;
}

__device__ __forceinline__ bool is_finite(const Range& range) {
  return range.hi <= 3.402823466e38f && range.lo >= -3.402823466e38f;
}

// The part of a row that a group of kThreads threads holds: raw 16-byte vectors, or, with kAny, floats.
// Floats may be rotated and come from any address, but take twice the registers of 16-bit elements.
template <class T, int kThreads, int kElementsPerThread, bool kAny>
struct Chunk {
  static constexpr int kVectors = kElementsPerThread / kVector<T>;
  static constexpr int kElements = kThreads * kElementsPerThread;
  using Vector = std::conditional_t<kAny, float[kVector<T>], uint4>;

  Vector vectors[kVectors];

  // The first element of a vector of this thread.
  static __device__ __forceinline__ int first_of(int vector) {
    return (vector * kThreads + static_cast<int>(threadIdx.x) % kThreads) * kVector<T>;
  }

  // Loads `count` elements at `from`, 0 beyond, and rotates them by blocks, the first of which starts there.
  // `aligned`: `from` and `count`
  // elements are multiples of 16 bytes; always true without kAny.
  __device__ __forceinline__ void load(const T* from, int count, bool aligned, Rotation rotation) {
    if (!kAny || aligned) {
      load_vectors(from, count, rotation, [](const T* first) { return ptx::load_once(first); });
    } else {
      load_vectors(from, count, rotation,
                   [&](const T* first) { return load_unaligned(first, from, from + count); });
    }
  }

  __device__ __forceinline__ void vector(int i, float (&v)[kVector<T>]) const {
    if constexpr (kAny) {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) v[j] = vectors[i][j];
    } else {
      unpack<T>(vectors[i], v);
    }
  }

  __device__ __forceinline__ void widen_range(Range& range) const {
    if constexpr (kAny) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) widen(range, Range{vectors[i][j], vectors[i][j]});
      }
    } else {
      uint32_t lo = vectors[0].x, hi = lo;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t words[4] = {vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          lo = min_of_words<T>(lo, words[j]);
          hi = max_of_words<T>(hi, words[j]);
        }
      }
      float lows[kVector<T>], highs[kVector<T>];
      unpack<T>(make_uint4(lo, lo, lo, lo), lows);
      unpack<T>(make_uint4(hi, hi, hi, hi), highs);
#pragma unroll
      for (int j = 0; j < kVector<T> / 4; ++j) widen(range, Range{lows[j], highs[j]});
    }
  }

 private:
  template <class Load>
  __device__ __forceinline__ void load_vectors(const T* from, int count, Rotation rotation,
                                               const Load& load_16_bytes) {
    const T* const thread_x = from + first_of(0);
    uint4 raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      raw[i] =
          first_of(i) < count ? load_16_bytes(thread_x + i * kThreads * kVector<T>) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kAny) {
        unpack<T>(raw[i], vectors[i]);
        if (rotation.signs) flip_signs(vectors[i], first_of(i), rotation.block);
        transform(vectors[i], rotation.block);
      } else {
        vectors[i] = raw[i];
      }
    }
  }
};

// ---- qparams ----

__device__ __forceinline__ QParams no_qparams() { return {__int_as_float(0x7fc00000), 0}; }

__device__ __forceinline__ QParams choose(const Range& range) {
  if (!is_finite(range)) return no_qparams();
  const float scale = fmaxf(range.hi / 255.0f - range.lo / 255.0f, 1.175494351e-38f);
  const float inverse = 1.0f / scale;
  const float zero_point = rintf(-128.0f - range.lo * inverse);
  return {scale, static_cast<int32_t>(fminf(fmaxf(zero_point, -128.0f), 127.0f))};
}

// ---- quantization ----

// The parameters by which a row is quantized.
struct Quantizer {
  float inverse_scale;
  int32_t zero_point;
  // The qparams were chosen from a finite range that contains the row: |x * inverse_scale| <= about 255.
  bool chosen;
};

__device__ __forceinline__ Quantizer quantizer_of(const QParams& qparams, bool chosen) {
  return {1.0f / qparams.scale, qparams.zero_point, chosen && qparams.scale == qparams.scale};
}

// 1.5 * 2^23: adding it rounds a float to an integer, in the low bits of the sum.
constexpr float kToInteger = 12582912.0f;

// q before saturation to int8. kChosen: see Quantizer.
template <bool kChosen>
__device__ __forceinline__ int32_t quantized(float x, const Quantizer& quantizer) {
  const float steps = x * quantizer.inverse_scale;
  if constexpr (kChosen) {
    return __float_as_int(steps + kToInteger) - __float_as_int(kToInteger) + quantizer.zero_point;
  } else {
    // `steps` may be NaN or infinite, and zero_point may be outside int8.
    const float shifted = rintf(steps) + static_cast<float>(quantizer.zero_point);
    const float limited = shifted != shifted ? 0.0f : fminf(fmaxf(shifted, -128.0f), 127.0f);
    return __float_as_int(limited + kToInteger) - __float_as_int(kToInteger);
  }
}

// Quantizes the first `count` elements of a chunk to q. `aligned`: q is a multiple of 16 bytes, and zeros are
// written from `count` up to `bytes`; otherwise only `count` bytes are written.
template <bool kChosen, class T, int kThreads, int kElementsPerThread, bool kAny>
__device__ __forceinline__ void store_chunk(const Chunk<T, kThreads, kElementsPerThread, kAny>& chunk,
                                            const Quantizer& quantizer, int8_t* q, int count, int bytes,
                                            bool aligned) {
  constexpr int kCount = kVector<T>;
  int8_t* const thread_q = q + chunk.first_of(0);
#pragma unroll
  for (int i = 0; i < chunk.kVectors; ++i) {
    const int first = chunk.first_of(i);
    if (first >= (aligned ? bytes : count)) break;
    float v[kCount];
    chunk.vector(i, v);
    int32_t values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      values[j] = quantized<kChosen>(v[j], quantizer);
    }
    if (first + kCount > count) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (first + j >= count) values[j] = 0;
      }
    }
    uint32_t words[kCount / 4];
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      words[j] = ptx::saturated_bytes(values[4 * j], values[4 * j + 1], values[4 * j + 2], values[4 * j + 3]);
    }
    int8_t* const target = thread_q + i * kThreads * kCount;
    if (!aligned) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (first + j < count) target[j] = static_cast<int8_t>(words[j / 4] >> (8 * (j % 4)));
      }
    } else if constexpr (kCount == 8) {
      *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(target) = words[0];
    }
  }
}

template <class T, int kThreads, int kElementsPerThread, bool kAny>
__device__ __forceinline__ void store_chunk(const Chunk<T, kThreads, kElementsPerThread, kAny>& chunk,
                                            const Quantizer& quantizer, int8_t* q, int count, int bytes,
                                            bool aligned) {
  if (quantizer.chosen) {
    store_chunk<true>(chunk, quantizer, q, count, bytes, aligned);
  } else {
    store_chunk<false>(chunk, quantizer, q, count, bytes, aligned);
  }
}

// The length of the chunk from `start` on, in a row of length `all`.
template <class Part>
__device__ __forceinline__ int within(int64_t all, int64_t start) {
  return static_cast<int>(min(all - start, int64_t{Part::kElements}));
}

// ---- for launches ----

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls body(T{}) with the C++ type of `dtype`.
template <class Body>
cudaError_t with_element_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat32) return body(float{});
  if (dtype == Dtype::kBFloat16) return body(BFloat16{});
  return body(Float16{});
}

}  // namespace dynquant::cuda
