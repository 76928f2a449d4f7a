// The layout of a tile in shared memory, and its descriptor for wgmma: pure functions.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DYNQUANT_ANYWHERE __host__ __device__ __forceinline__
#else
#define DYNQUANT_ANYWHERE inline
#endif

namespace dynquant::cuda {

// A row is 64 bytes of k, in 4 chunks of 16. ldmatrix reads the same chunk of eight neighbouring rows at
// once; the swizzle puts these in eight different 16-byte columns of the 128 bytes that the banks serve
// together:
//
//   bytes   0    16   32   48 |  64   80   96  112
//         r0c0 r0c1 r0c2 r0c3 | r1c0 r1c1 r1c2 r1c3
//         r2c1 r2c0 r2c3 r2c2 | r3c1 r3c0 r3c3 r3c2
//         r4c2 r4c3 r4c0 r4c1 | r5c2 r5c3 r5c0 r5c1
//         r6c3 r6c2 r6c1 r6c0 | r7c3 r7c2 r7c1 r7c0
DYNQUANT_ANYWHERE constexpr int offset_in_rows_of_64(int row, int chunk) {
  return row * 64 + (chunk ^ (row / 2 % 4)) * 16;
}

// wgmma's descriptor of an operand in shared memory whose rows are 128 bytes of k, as TMA writes them with
// its 128-byte swizzle: groups of 8 rows (1024 bytes, aligned to 1024), in which the 16-byte chunk c of row r
// is stored in the place of chunk c ^ r. An `address` 32, 64 or 96 bytes into the first row is later k.
//
//   bits 0-13   address / 16
//   bits 16-29  leading byte offset / 16: not used with a swizzle, 1
//   bits 32-45  stride byte offset / 16: from one group of 8 rows to the next
//   bits 62-63  1: swizzle of 128 bytes
DYNQUANT_ANYWHERE constexpr uint64_t descriptor_of_rows_of_128(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

}  // namespace dynquant::cuda
