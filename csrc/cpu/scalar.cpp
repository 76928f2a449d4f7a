// The body for any CPU, over the compiler's own vectors: no instruction beyond the platform's baseline.
#include "isa.h"
#include "kernels.h"

namespace dynquant::cpu {
namespace {
#include "bfloat16.h"
#include "vector_128.h"

// One int8 of the group a step, in 32-bit lanes.
struct Dot {
  static constexpr int kSteps = 4;
  static constexpr int kGroupBytes = 4;
  static constexpr bool kWidens = true;  // whether load_weight costs more than a load
  static constexpr int32_t kOffset = 0;

  template <int step>
  static V::I load_weight(const int8_t* b) {
    return V::I{b[step], b[step + 4], b[step + 8], b[step + 12]};
  }

  template <int step>
  static V::I broadcast_operand(const uint8_t* a) {
    return V::broadcast(static_cast<int32_t>(static_cast<int8_t>(a[step])));
  }

  static V::I multiply_add(V::I acc, V::I a, V::I b) { return V::add(acc, V::mul(a, b)); }

  static void store_operand(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    V::store_bytes(reinterpret_cast<int8_t*>(p), q0, q1, q2, q3);
  }
};

#include "kernel_body.h"
}  // namespace

extern const Kernels kScalar = make_kernels("scalar", 8.0);
}  // namespace dynquant::cpu
