// For any CPU, over the compiler's portable vectors: no instruction beyond the platform's baseline.
#include "cpu/isa/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/dot/concept.h"

namespace dynquant::cpu {
namespace {
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_128.h"
#include "cpu/generic/prelude.h"

// Each step multiplies one int8 of the group, widened to a 32-bit lane.
struct Dot {
  static constexpr int kMaxRows = 6;
  template <int kRows>
  static constexpr int kVectors = kRows <= 2 ? 4 : 2;

  static constexpr int kGroupBytes = 4;  // of a packed row, for 4 elements
  static constexpr int32_t kOffset = 0;  // packed value = q + kOffset
  using ZeroPointCompensation = CompensationByProduct;
  static constexpr bool kPlans = false;
  static constexpr int64_t kGroupsOfKBlock = 0;  // K is not blocked

  template <int kByte>
  struct Byte {
    static constexpr int kActivationsAt = 0;

    static V::I weight(V::I w) { return byte(w); }

    static V::I multiply_add(V::I acc, V::I a, V::I w) { return V::add(acc, V::mul(byte(a), w)); }

   private:
    static V::I byte(V::I x) { return V::shift_left<24 - 8 * kByte>(x) >> 24; }
  };
  using Exact = Products<Byte<0>, Byte<1>, Byte<2>, Byte<3>>;

  static void store_activations(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    V::store_bytes(reinterpret_cast<int8_t*>(p), q0, q1, q2, q3);
  }
};

#include "cpu/generic/kernels.h"
}  // namespace

extern const KernelTable kScalar = make_kernels("scalar", 8.0);
}  // namespace dynquant::cpu
