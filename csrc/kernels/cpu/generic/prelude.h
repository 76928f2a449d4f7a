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
