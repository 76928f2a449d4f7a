// 16-byte loads from memory that is aligned to its elements only.
#pragma once

#include "ptx.cuh"

namespace dynquant::cuda {

// 16 bytes from any address; bytes outside [from, to) are not read and count as 0.
__device__ __forceinline__ uint4 load_unaligned(const void* source, const void* from, const void* to) {
  const uint8_t* const begin = static_cast<const uint8_t*>(from);
  const uint8_t* const end = static_cast<const uint8_t*>(to);
  const uint32_t offset = reinterpret_cast<uintptr_t>(source) % 4;
  const uint8_t* const first = static_cast<const uint8_t*>(source) - offset;
  if (first >= begin && first + 20 <= end) {
    const uint32_t* const word = reinterpret_cast<const uint32_t*>(first);
    const uint32_t w0 = __ldg(word), w1 = __ldg(word + 1), w2 = __ldg(word + 2), w3 = __ldg(word + 3),
                   w4 = __ldg(word + 4);
    return make_uint4(__funnelshift_r(w0, w1, 8 * offset), __funnelshift_r(w1, w2, 8 * offset),
                      __funnelshift_r(w2, w3, 8 * offset), __funnelshift_r(w3, w4, 8 * offset));
  }
  uint64_t half[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll 1
    for (int byte = 0; byte < 8; ++byte) {
      const uint8_t* const at = first + offset + 8 * i + byte;
      if (at >= begin && at < end) half[i] |= static_cast<uint64_t>(*at) << (8 * byte);
    }
  }
  return make_uint4(static_cast<uint32_t>(half[0]), static_cast<uint32_t>(half[0] >> 32),
                    static_cast<uint32_t>(half[1]), static_cast<uint32_t>(half[1] >> 32));
}

}  // namespace dynquant::cuda
