// csrc/kernels/cuda/ptx.cuh for the CPU: included first, with the same guard, it replaces the original. The
// instructions follow the PTX manual, not the kernels.
#ifndef DYNQUANT_CUDA_PTX_CUH_
#define DYNQUANT_CUDA_PTX_CUH_

#include <cuda.h>
#include <cuda_runtime.h>

#include <cmath>
#include <string>

namespace dynquant::cuda::ptx {

// ---- memory ----

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::shared_memory());
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulator::shared_memory());
}

inline uint4 load_once(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
    emulator::fail("a 16-byte load from an unaligned address");
  return *static_cast<const uint4*>(pointer);
}

inline int warp_number() { return static_cast<int>(emulator::thread_number() / 32); }

inline void store_16_bytes(void* target, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0)
    emulator::fail("a 16-byte store to an unaligned address");
  *static_cast<uint4*>(target) = uint4{a, b, c, d};
}

inline void barrier_of_threads(int number, int threads) {
  emulator::meet_threads("bar.sync", static_cast<unsigned>(number), static_cast<unsigned>(threads));
}

// ---- order of kernels ----

inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {
  if (emulated_device::code >= 90) emulator::synchronize();
}

// ---- numbers ----

inline float min_nan(float a, float b) { return a != a ? a : (b != b ? b : std::fmin(a, b)); }
inline float max_nan(float a, float b) { return a != a ? a : (b != b ? b : std::fmax(a, b)); }

inline float float_from_half(uint16_t bits);

// Minimum or maximum of each of the two numbers packed in a word, compared as floats; NaN wins.
template <bool kMin, class ToFloat>
uint32_t chosen_pair(uint32_t a, uint32_t b, const ToFloat& to_float) {
  uint32_t chosen = 0;
  for (int shift : {0, 16}) {
    const uint16_t x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    const float of_x = to_float(x), of_y = to_float(y);
    const bool first = of_x != of_x || (of_y == of_y && (kMin ? of_x <= of_y : of_x >= of_y));
    chosen |= uint32_t{first ? x : y} << shift;
  }
  return chosen;
}
inline float float_from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
inline uint32_t min_nan_bfloat16_pair(uint32_t a, uint32_t b) {
  return chosen_pair<true>(a, b, float_from_bfloat16);
}
inline uint32_t max_nan_bfloat16_pair(uint32_t a, uint32_t b) {
  return chosen_pair<false>(a, b, float_from_bfloat16);
}
inline uint32_t min_nan_half_pair(uint32_t a, uint32_t b) { return chosen_pair<true>(a, b, float_from_half); }
inline uint32_t max_nan_half_pair(uint32_t a, uint32_t b) {
  return chosen_pair<false>(a, b, float_from_half);
}

inline uint32_t saturated_bytes(int32_t a, int32_t b, int32_t c, int32_t d) {
  uint32_t bytes = 0;
  int shift = 0;
  for (int32_t x : {a, b, c, d}) {
    const int32_t limited = x < -128 ? -128 : x > 127 ? 127 : x;
    bytes |= static_cast<uint32_t>(limited & 0xff) << shift;
    shift += 8;
  }
  return bytes;
}

inline float float_from_half(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

inline uint32_t half_pair(float low, float high) {
  const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

inline uint32_t bfloat16_pair(float low, float high) {
  const auto rounded = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}

// ---- cp.async ----

template <size_t kBytes>
void copy_bytes_async(void* shared, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0 ||
      (valid && reinterpret_cast<uintptr_t>(source) % kBytes != 0)) {
    emulator::fail("cp.async of " + std::to_string(kBytes) + " bytes at an unaligned address");
  }
  emulator::copy_async([=] {
    if (valid) {
      std::memcpy(shared, source, kBytes);
    } else {
      std::memset(shared, 0, kBytes);
    }
  });
}

inline void copy_async(void* shared, const void* source, bool valid) {
  copy_bytes_async<16>(shared, source, valid);
}
inline void copy_word_async(void* shared, const void* source, bool valid) {
  copy_bytes_async<4>(shared, source, valid);
}

inline void copy_async_commit() { emulator::copy_async_commit(); }

template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

// ---- mma.sync ----

inline void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  struct Lane {
    uint32_t* r;
    const unsigned char* row;
  } lane = {r, static_cast<const unsigned char*>(shared_row)};
  if (shared_address(shared_row) % 16 != 0) emulator::fail("ldmatrix of an unaligned row");
  emulator::meet_warp("ldmatrix", &lane, [](void** lanes, unsigned) {
    for (int number = 0; number < 32; ++number) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* owner = static_cast<Lane*>(lanes[8 * matrix + number / 4]);
        std::memcpy(static_cast<Lane*>(lanes[number])->r + matrix, owner->row + number % 4 * 4, 4);
      }
    }
  });
}

inline void store_matrices(void* shared_row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  struct Lane {
    uint32_t r[4];
    unsigned char* row;
  } lane = {{a, b, c, d}, static_cast<unsigned char*>(shared_row)};
  if (shared_address(shared_row) % 16 != 0) emulator::fail("stmatrix to an unaligned row");
  emulator::meet_warp("stmatrix", &lane, [](void** lanes, unsigned) {
    for (int number = 0; number < 32; ++number) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        auto* owner = static_cast<Lane*>(lanes[8 * matrix + number / 4]);
        std::memcpy(owner->row + number % 4 * 4, static_cast<Lane*>(lanes[number])->r + matrix, 4);
      }
    }
  });
}

// The manual's table: element i of a fragment and its position in the matrix.
//   a (4 registers of 4 bytes): row = g for i in 0-3 and 8-11, else g + 8; column = 4t + i%4, + 16 for i >= 8
//   b (2 registers): row = 4t + i%4, + 16 for i >= 4; column = g
//   c (4 integers): row = g for i < 2, else g + 8; column = 2t + i%2
inline void mma_16x8x32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    int32_t* c;
    int8_t a[16];
    int8_t b[8];
  } lane;
  lane.c = c;
  std::memcpy(lane.a, a, 16);
  std::memcpy(lane.b, &b0, 4);
  std::memcpy(lane.b + 4, &b1, 4);
  emulator::meet_warp("mma.sync", &lane, [](void** lanes, unsigned) {
    int a_matrix[16][32], b_matrix[8][32];
    for (int number = 0; number < 32; ++number) {
      const auto* lane = static_cast<Lane*>(lanes[number]);
      const int g = number / 4, t = number % 4;
      for (int i = 0; i < 16; ++i) {
        const int row = i < 4 || (i >= 8 && i < 12) ? g : g + 8;
        a_matrix[row][4 * t + i % 4 + (i >= 8 ? 16 : 0)] = lane->a[i];
      }
      for (int i = 0; i < 8; ++i) b_matrix[g][4 * t + i % 4 + (i >= 4 ? 16 : 0)] = lane->b[i];
    }
    for (int number = 0; number < 32; ++number) {
      auto* lane = static_cast<Lane*>(lanes[number]);
      for (int i = 0; i < 4; ++i) {
        const int row = number / 4 + (i < 2 ? 0 : 8), column = number % 4 * 2 + i % 2;
        int32_t sum = 0;
        for (int k = 0; k < 32; ++k) sum += a_matrix[row][k] * b_matrix[column][k];
        lane->c[i] += sum;
      }
    }
  });
}

// ---- clusters, mbarrier, TMA, wgmma ----

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync() { emulator::meet_cluster("barrier.cluster"); }
inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}

inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  // Announce and arrive in one step: the phase must not end in between.
  emulator::barrier_expect(barrier, bytes);
  emulator::barrier_arrive(barrier);
}

inline void barrier_arrive_remote(uint64_t* barrier, uint32_t block_rank) {
  emulator::barrier_arrive(emulator::in_block(barrier, block_rank));
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline void prefetch_tensor_map(const void*) {}

// Swizzle of 128 bytes: bits 4-6 of the address in shared memory change by bits 7-9.
inline uint32_t swizzled_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// `base`: the shared memory of the receiving block; `address`: the target of the box in it.
inline void deliver_box(unsigned char* base, uint32_t address, const CUtensorMap& map, int32_t column,
                        int32_t row, void* barrier) {
  emulator::later([=] {
    for (uint32_t i = 0; i < map.box_rows; ++i) {
      for (uint32_t j = 0; j < map.box_columns; ++j) {
        const int64_t r = int64_t{row} + i, c = int64_t{column} + j;
        const bool inside =
            r >= 0 && c >= 0 && r < static_cast<int64_t>(map.rows) && c < static_cast<int64_t>(map.columns);
        base[swizzled_128(address + i * map.box_columns + j)] = inside ? map.data[r * map.row_bytes + c] : 0;
      }
    }
    emulator::barrier_expect(barrier, -static_cast<int64_t>(map.box_rows * map.box_columns));
  });
}

inline void copy_box_to_cluster(void* shared, const void* map, int32_t column, int32_t row, uint64_t* barrier,
                                uint16_t blocks) {
  const uint32_t address = shared_address(shared);
  if (address % 1024 != 0) emulator::fail("a swizzled box that does not start at a multiple of 1024 bytes");
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    unsigned char* const base =
        static_cast<unsigned char*>(emulator::in_block(emulator::shared_memory(), rank));
    deliver_box(base, address, *static_cast<const CUtensorMap*>(map), column, row,
                emulator::in_block(barrier, rank));
  }
}

inline void copy_box(void* shared, const void* map, int32_t column, int32_t row, uint64_t* barrier) {
  copy_box_to_cluster(shared, map, column, row, barrier,
                      static_cast<uint16_t>(1u << emulator::cluster_rank()));
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void wgmma_fence() {}
template <int kCount>
void keep_registers(int32_t (&)[kCount]) {}

inline void wgmma_commit() {
  emulator::meet_warp("wgmma.commit_group", nullptr, [](void**, unsigned) { emulator::wgmma_commit(); });
}

template <int kPending>
void wgmma_wait() {
  emulator::meet_warp("wgmma.wait_group", nullptr, [](void**, unsigned) { emulator::wgmma_wait(kPending); });
}

// A byte of an operand by its descriptor: rows of k, swizzled by 128 bytes, groups of 8 rows.
inline int8_t operand(const unsigned char* shared, uint64_t descriptor, int row, int k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) emulator::fail("a wgmma descriptor without the 128-byte swizzle");
  const uint32_t address = start + static_cast<uint32_t>(row / 8) * stride +
                           static_cast<uint32_t>(row % 8) * 128 + static_cast<uint32_t>(k);
  return static_cast<int8_t>(shared[swizzled_128(address)]);
}

template <int kN>
void wgmma_64xNx32(int32_t (&c)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  struct Lane {
    int32_t* c;
    uint64_t a, b;
    bool accumulate;
  } lane = {c, a, b, accumulate};
  emulator::meet_warp("wgmma", &lane, [](void** lanes, unsigned) {
    struct Product {
      int32_t* c[32];
      uint64_t a, b;
      bool accumulate;
      unsigned warp;
      const unsigned char* shared;
    } product;
    const auto* first = static_cast<Lane*>(lanes[0]);
    for (int number = 0; number < 32; ++number) {
      const auto* lane = static_cast<Lane*>(lanes[number]);
      product.c[number] = lane->c;
      if (lane->a != first->a || lane->b != first->b)
        emulator::fail("lanes with different wgmma descriptors");
    }
    product.a = first->a;
    product.b = first->b;
    product.accumulate = first->accumulate;
    product.warp = emulator::thread_number() / 32 % 4;
    product.shared = emulator::shared_memory();
    emulator::wgmma([product] {
      int8_t a_rows[16][32], b_rows[kN][32];
      for (int k = 0; k < 32; ++k) {
        for (int row = 0; row < 16; ++row) {
          a_rows[row][k] = operand(product.shared, product.a, static_cast<int>(product.warp) * 16 + row, k);
        }
        for (int row = 0; row < kN; ++row) b_rows[row][k] = operand(product.shared, product.b, row, k);
      }
      for (int number = 0; number < 32; ++number) {
        for (int i = 0; i < kN / 2; ++i) {
          const int row = number / 4 + (i % 4 < 2 ? 0 : 8), column = i / 4 * 8 + number % 4 * 2 + i % 2;
          int32_t sum = product.accumulate ? product.c[number][i] : 0;
          for (int k = 0; k < 32; ++k) sum += a_rows[row][k] * b_rows[column][k];
          product.c[number][i] = sum;
        }
      }
    });
  });
}

}  // namespace dynquant::cuda::ptx

#endif  // DYNQUANT_CUDA_PTX_CUH_
