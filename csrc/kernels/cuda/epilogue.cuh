// From accumulators to outputs, for every GEMM kernel:
//
//   acc[m, n] = sum_k q[m, k] * weight[n, k] - zero_point[m] * weight_sum[n]
//   out[m, n] = cast(function(fma(float(acc[m, n]) * weight_scale[n], scale[m], bias[n])))
//
// A thread writes 8 neighbouring outputs of a row: 16 bytes of the narrowest dtype.
#pragma once

#include "gemm.h"
#include "ptx.cuh"

namespace dynquant::cuda {

#define DYNQUANT_INLINE __device__ __forceinline__
#include "epilogue_math.h"
#undef DYNQUANT_INLINE

// The vector type of epilogue_math.h for a single number.
struct Scalar {
  using F = float;
  using I = int32_t;

  static __device__ __forceinline__ F broadcast(float x) { return x; }
  static __device__ __forceinline__ I broadcast(int32_t x) { return x; }
  static __device__ __forceinline__ F add(F a, F b) { return a + b; }
  static __device__ __forceinline__ F sub(F a, F b) { return a - b; }
  static __device__ __forceinline__ F mul(F a, F b) { return a * b; }
  static __device__ __forceinline__ F div(F a, F b) { return a / b; }
  static __device__ __forceinline__ F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
  static __device__ __forceinline__ F min(F a, F b) { return a < b ? a : b; }
  static __device__ __forceinline__ F max(F a, F b) { return a > b ? a : b; }
  static __device__ __forceinline__ I bit_and(I a, I b) { return a & b; }
  template <int kCount>
  static __device__ __forceinline__ I shift_left(I a) {
    return static_cast<I>(static_cast<uint32_t>(a) << kCount);
  }
  static __device__ __forceinline__ I as_int(F a) { return __float_as_int(a); }
  static __device__ __forceinline__ F as_float(I a) { return __int_as_float(a); }
};

constexpr int kGroup = 8;

// Qparams of a tile's columns in shared memory, copied during the main loop. kColumns is a multiple of 8.
template <int kColumns>
struct alignas(16) ColumnQParams {
  float scale[kColumns];
  int32_t sum[kColumns];
  float bias[kColumns];  // -0 without bias: a product plus -0 is the rounded product, also where that is 0
};

struct GroupQParams {
  float scale[kGroup];
  int32_t sum[kGroup];
  float bias[kGroup];
};

__device__ __forceinline__ QParams load_row(const Output& out, int64_t m) {
  if (out.dtype == Dtype::kInt32 || m >= out.m) return {0.0f, 0};
  return {out.scale[m * out.row_stride], out.zero_point[m * out.row_stride]};
}

// A bias of 2 bytes an element, widened.
__device__ __forceinline__ float narrow_bias(const Output& out, int64_t column) {
  const uint16_t bits = static_cast<const uint16_t*>(out.bias)[column];
  return out.bias_dtype == Dtype::kBFloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                            : ptx::float_from_half(bits);
}

// Starts to copy the qparams of the columns from n on; each `thread` of kThreads copies its share. All have
// arrived after copy_async_wait<0> and a barrier. Columns beyond the last one get zeros; int32 needs no copy.
template <int kThreads, int kColumns>
__device__ __forceinline__ void fetch_columns(const Output& out, int64_t n, int thread,
                                              ColumnQParams<kColumns>* shared) {
  if (out.dtype == Dtype::kInt32) return;
#pragma unroll 1
  for (int i = thread; i < kColumns; i += kThreads) {
    const bool inside = n + i < out.n;
    const int64_t column = inside ? n + i : 0;
    ptx::copy_word_async(shared->scale + i, out.weight_scale + column, inside);
    ptx::copy_word_async(shared->sum + i, out.weight_sum + column, inside);
    if (out.bias == nullptr) {
      shared->bias[i] = -0.0f;
    } else if (out.bias_dtype == Dtype::kFloat32) {
      ptx::copy_word_async(shared->bias + i, static_cast<const float*>(out.bias) + column, inside);
    } else {
      shared->bias[i] = inside ? narrow_bias(out, column) : 0.0f;
    }
  }
}

template <class T>
__device__ __forceinline__ void load_group(const T* source, T (&values)[kGroup]) {
  static_assert(sizeof(T) == 4);
#pragma unroll
  for (int i = 0; i < kGroup; i += 4) {
    const int4 words = *reinterpret_cast<const int4*>(source + i);
    memcpy(values + i, &words, sizeof(words));
  }
}

// The qparams of 8 columns from `column` of the tile on.
template <int kColumns>
__device__ __forceinline__ GroupQParams load_group(const ColumnQParams<kColumns>& columns, int column) {
  GroupQParams group;
  load_group(columns.scale + column, group.scale);
  load_group(columns.sum + column, group.sum);
  load_group(columns.bias + column, group.bias);
  return group;
}

// acc has the zero point compensated.
__device__ __forceinline__ float dequantized(float acc, float column_scale, float row_scale, float bias) {
  return Scalar::fma(acc * column_scale, row_scale, bias);
}

__device__ __forceinline__ void apply(Epilogue function, float (&y)[kGroup]) {
  using Math = EpilogueMath<Scalar>;
  const auto each = [&](const auto& scalar_function) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      y[i] = scalar_function(y[i]);
    }
  };
  switch (function) {
    case Epilogue::kNone: break;
#define DYNQUANT_CASE(name, function) \
  case Epilogue::name: each([](float x) { return Math::function(x); }); break;
      DYNQUANT_ACTIVATIONS(DYNQUANT_CASE)
#undef DYNQUANT_CASE
  }
}

// Stores up to 8 elements, packed in words, to memory that may be aligned to its elements only; `count`
// elements remain in the row.
template <int kWords>
__device__ __forceinline__ void store_words(void* target, const uint32_t (&words)[kWords], int64_t count) {
  if (count >= kGroup && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      ptx::store_16_bytes(static_cast<uint32_t*>(target) + i, words[i], words[i + 1], words[i + 2],
                          words[i + 3]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) {
      if constexpr (kWords == kGroup) {
        static_cast<uint32_t*>(target)[i] = words[i];
      } else {
        static_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

// Eight sums over k of one row: exact, and with the zero point compensated, rounded once.
struct Accumulators {
  int32_t exact[kGroup];
  float compensated[kGroup];
};

// Sum is int32_t, or int64_t for sums of several parts of k.
template <class Sum>
__device__ __forceinline__ Accumulators compensate(const Sum (&sums)[kGroup], const QParams& row,
                                                   const GroupQParams& columns) {
  Accumulators acc;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    acc.exact[i] = static_cast<int32_t>(sums[i]);
    acc.compensated[i] = static_cast<float>(sums[i] - static_cast<Sum>(row.zero_point) * columns.sum[i]);
  }
  return acc;
}

// Writes outputs n ... n + 7 of row m, except those outside the matrix.
__device__ __forceinline__ void write_outputs(const Output& out, int64_t m, int64_t n,
                                              const Accumulators& acc, const QParams& row,
                                              const GroupQParams& columns) {
  if (m >= out.m || n >= out.n) return;
  const int64_t first = m * out.n + n;
  uint32_t words[kGroup];
  if (out.dtype == Dtype::kInt32) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      words[i] = static_cast<uint32_t>(acc.exact[i]);
    }
    store_words(static_cast<int32_t*>(out.data) + first, words, out.n - n);
    return;
  }
  float y[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    y[i] = dequantized(acc.compensated[i], columns.scale[i], row.scale, columns.bias[i]);
  }
  apply(out.function, y);
  if (out.dtype == Dtype::kFloat32) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      words[i] = __float_as_uint(y[i]);
    }
    store_words(static_cast<float*>(out.data) + first, words, out.n - n);
    return;
  }
  uint32_t pairs[kGroup / 2];
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    pairs[i] = out.dtype == Dtype::kBFloat16 ? ptx::bfloat16_pair(y[2 * i], y[2 * i + 1])
                                             : ptx::half_pair(y[2 * i], y[2 * i + 1]);
  }
  store_words(static_cast<uint16_t*>(out.data) + first, pairs, out.n - n);
}

// ---- parts of k ----

__device__ __forceinline__ void store_part(const Output& out, int32_t* sums, int part, int64_t m, int64_t n,
                                           const int32_t (&values)[kGroup]) {
  if (m >= out.m || n >= out.n) return;
  int32_t* target = sums + (part * out.m + m) * out.n + n;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (n + i < out.n) target[i] = values[i];
  }
}

// Called by all threads of a block after storing its part of a tile: whether all other parts are stored. True
// for exactly one block of each tile.
__device__ __forceinline__ bool is_last_part(int32_t* counter, int parts) {
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1) == parts - 1);
  __threadfence();
  return last;
}

__device__ __forceinline__ void add_parts(const Output& out, const int32_t* sums, int parts, int64_t m,
                                          int64_t n, int64_t (&total)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    total[i] = 0;
  }
  if (m >= out.m) return;
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    const int32_t* source = sums + (part * out.m + m) * out.n + n;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (n + i < out.n) total[i] += __ldcg(source + i);
    }
  }
}

// The end of every GEMM kernel but wgmma's. The block's sums of a kTileM x kTileN tile at (m, n) are
// complete: sums_at(row, group, values) returns the 8 sums of a row and a group of columns. The qparams of
// the columns have arrived. Every thread of the block calls this; each processes every kThreads-th group.
template <int kThreads, int kTileM, int kTileN, class SumsAt>
__device__ __forceinline__ void finish_tile(const Output& out, int64_t m, int64_t n, int parts, int part,
                                            int64_t tile, int32_t* counters, int32_t* partial_sums,
                                            const ColumnQParams<kTileN>& tile_columns,
                                            const SumsAt& sums_at) {
  constexpr int kGroups = kTileN / kGroup;
  static_assert(kThreads % kGroups == 0, "a thread keeps to its columns");
  const int group = threadIdx.x % kGroups;
  const int64_t column = n + group * kGroup;
  if (parts > 1) {
#pragma unroll 1
    for (int row = threadIdx.x / kGroups; row < kTileM; row += kThreads / kGroups) {
      int32_t values[kGroup];
      sums_at(row, group, values);
      store_part(out, partial_sums, part, m + row, column, values);
    }
    if (!is_last_part(counters + tile, parts)) return;
  }
  const GroupQParams columns = load_group(tile_columns, group * kGroup);
#pragma unroll 1
  for (int row = threadIdx.x / kGroups; row < kTileM; row += kThreads / kGroups) {
    const QParams qparams = load_row(out, m + row);
    Accumulators acc;
    if (parts > 1) {
      int64_t total[kGroup];
      add_parts(out, partial_sums, parts, m + row, column, total);
      acc = compensate(total, qparams, columns);
    } else {
      int32_t values[kGroup];
      sums_at(row, group, values);
      acc = compensate(values, qparams, columns);
    }
    write_outputs(out, m + row, column, acc, qparams, columns);
  }
}

}  // namespace dynquant::cuda
