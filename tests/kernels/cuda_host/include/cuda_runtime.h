// csrc/kernels/cuda's part of the CUDA runtime, on the CPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// threadIdx.x and the others: the values of the running thread.
template <auto kTriple, unsigned emulator::Index::* kAxis>
struct Coordinate {
  operator unsigned() const { return kTriple().*kAxis; }
};
template <auto kTriple>
struct Coordinates {
  Coordinate<kTriple, &emulator::Index::x> x;
  Coordinate<kTriple, &emulator::Index::y> y;
  Coordinate<kTriple, &emulator::Index::z> z;
};
inline const Coordinates<&emulator::thread_index> threadIdx;
inline const Coordinates<&emulator::block_index> blockIdx;
inline const Coordinates<&emulator::block_size> blockDim;
inline const Coordinates<&emulator::grid_size> gridDim;

// ---- device functions ----

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int32_t __float_as_int(float x) { return static_cast<int32_t>(__float_as_uint(x)); }
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((uint64_t{high} << 32) | low) >> (shift & 31));
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t{b} << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  }
  return result;
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}

inline int atomicAdd(int* pointer, int value) {
  const int old = *pointer;
  *pointer += value;
  return old;
}

inline void __threadfence() {}
inline void __syncthreads() { emulator::meet_block("__syncthreads", nullptr, nullptr); }
inline void __syncwarp() { emulator::meet_warp("__syncwarp", nullptr, nullptr); }

inline int __syncthreads_or(int value) {
  emulator::meet_block("__syncthreads_or", &value, [](void** values, unsigned count) {
    int any = 0;
    for (unsigned i = 0; i < count; ++i) any |= *static_cast<int*>(values[i]) != 0;
    for (unsigned i = 0; i < count; ++i) *static_cast<int*>(values[i]) = any;
  });
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != ~0u) emulator::fail("a shuffle of a part of a warp");
  struct Lane {
    T value;
    T result;
    int lanes;
  } lane = {value, value, lanes};
  emulator::meet_warp("__shfl_xor_sync", &lane, [](void** all, unsigned count) {
    for (unsigned i = 0; i < count; ++i) {
      Lane* mine = static_cast<Lane*>(all[i]);
      mine->result = static_cast<Lane*>(all[i ^ static_cast<unsigned>(mine->lanes)])->value;
    }
  });
  return lane.result;
}

// ---- host functions ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorSymbolNotFound = 500,
};
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault = 0 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulated_device {
extern int capability;
extern int multiprocessors;
extern int code;
extern int index;
extern int launches;
size_t shared_bytes_of_block();
}  // namespace emulated_device

cudaError_t cudaGetDevice(int* index);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index);
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_row, const void* source, size_t source_row,
                              size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemset2DAsync(void* target, size_t row, int value, size_t width, size_t height,
                              cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* target, int value, size_t count, cudaStream_t stream);
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
cudaError_t remember_shared_bytes(const void* kernel, int bytes);
cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config, emulator::Shape* shape);

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = emulated_device::code;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return remember_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::Shape shape;
  const cudaError_t error = check_launch(reinterpret_cast<const void*>(kernel), *config, &shape);
  if (error != cudaSuccess) return error;
  std::tuple<Parameters...> values(arguments...);
  emulator::launch(shape, [kernel, values] { std::apply(kernel, values); });
  return cudaSuccess;
}
