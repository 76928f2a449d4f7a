// Shared by dot products and generic kernels. Included inside an instruction set's namespace and target
// region, after its vector type.

using F = V::F;
using I = V::I;
constexpr int W = V::kLanes;
constexpr int kChunk = 4 * W;  // elements per step of the quantizers

#define DYNQUANT_INLINE inline __attribute__((always_inline))
#define DYNQUANT_INLINE_LAMBDA __attribute__((always_inline))
#define DYNQUANT_UNROLL _Pragma("GCC unroll 32")

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// Asks for the lines of `count` elements at p, to be read or, with kWrite, written.
template <bool kWrite = false, typename T>
DYNQUANT_INLINE void fetch(const T* p, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(p);
  const int64_t size = count * static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(bytes + at, kWrite ? 1 : 0);
  if (size > 0) __builtin_prefetch(bytes + size - 1, kWrite ? 1 : 0);
}

template <typename T>
F load_part(const T* p, int64_t count) {
  T lanes[W] = {};
  __builtin_memcpy(lanes, p, count * sizeof(T));
  return V::load(lanes);
}

template <typename T>
void store_part(T* p, F x, int64_t count) {
  T lanes[W];
  V::store(lanes, x);
  __builtin_memcpy(p, lanes, count * sizeof(T));
}

// The elements at p of which `count` exist, up to W, and zeros beyond them. Any count: the end of a row may
// lie behind a vector or before it.
template <typename T>
DYNQUANT_INLINE F load_up_to(const T* p, int64_t count) {
  return count >= W ? V::load(p) : count > 0 ? load_part(p, count) : V::broadcast(0.0f);
}

// Writes the lanes of x for which an element at p exists, of `count` in all.
template <typename T>
DYNQUANT_INLINE void store_up_to(T* p, F x, int64_t count) {
  if (count >= W) {
    V::store(p, x);
  } else if (count > 0) {
    store_part(p, x, count);
  }
}

// How offset * sum is subtracted from an accumulator (Dot::ZeroPointCompensation). This one suits every ISA
// while int32 is exact.
struct CompensationByProduct {
  static constexpr int64_t kMaxK = kMaxInt32K;

  static I prepare_sums(I sum) { return sum; }
  static I prepare_offset(int32_t offset) { return V::broadcast(offset); }
  static I subtract(I acc, I offset, I sum) { return V::sub(acc, V::mul(offset, sum)); }
};

// How a group of 4 along K becomes products: in one or more steps, each a type with
//   kActivationsAt                          offset of its 4 bytes of activations in a row's group
//   weight(bytes of W channels)             the factors of this step
//   multiply_add(acc, activations, weight)  acc plus the products of each channel, in 32-bit lanes
template <typename... Steps>
struct Products {};
