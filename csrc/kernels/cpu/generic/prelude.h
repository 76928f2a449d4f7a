// What dot products and kernel bodies share. Included inside an instruction set's namespace and target region, after
// its vector_*.h.

using F = V::F;
using I = V::I;
constexpr int W = V::kLanes;
constexpr int kChunk = 4 * W;  // elements that the quantizers handle at a time

#define DYNQUANT_INLINE inline __attribute__((always_inline))
#define DYNQUANT_INLINE_LAMBDA __attribute__((always_inline))
#define DYNQUANT_UNROLL _Pragma("GCC unroll 32")

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// How offset * sum is taken off an accumulator: Dot::TakenOff. This one suits all, for as many K as an int32 holds.
struct TakenOffByProduct {
  static constexpr int64_t kMaxK = kMaxInt32K;

  static I of_sums(I sum) { return sum; }
  static I of_offset(int32_t offset) { return V::broadcast(offset); }
  static I from(I acc, I offset, I sum) { return V::sub(acc, V::mul(offset, sum)); }
};

// How a group of 4 along K becomes products: in one or more steps, each a type with
//   kOperandAt                           where in a row's group its operand lies: 4 bytes
//   weight(bytes of W channels)          what of them the step multiplies
//   multiply_add(acc, operand, weight)   acc and the products of each channel, in 32-bit lanes
template <typename... Steps>
struct Products {};
