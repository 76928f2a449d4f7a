// The dot product of VNNI, one instruction in several encodings: DYNQUANT_DPBUSD is the intrinsic of the one at hand,
// DYNQUANT_DPBUSD_ASM its name, DYNQUANT_DPBUSD_REGISTERS the registers it can use. Included inside an instruction
// set's namespace and target region, after its vector_*.h.

// vpdpbusd multiplies unsigned by signed bytes: the operand is q + 128, and 128 * weight_sum is taken off
// again.
struct VnniDot {
  static constexpr int kMaxRows = 6;

  static constexpr int kGroupBytes = 4;    // of an operand row, for 4 elements
  static constexpr int32_t kOffset = 128;  // stored operand = q + kOffset
  static constexpr bool kPlans = false;

  struct Dpbusd {
    static constexpr int kOperandAt = 0;

    static V::I weight(V::I w) { return w; }

    static V::I multiply_add(V::I acc, V::I a, V::I b) {
#if defined(DYNQUANT_EMULATED)
      return DYNQUANT_DPBUSD(acc, a, b);
#else  // the intrinsic makes GCC 12 copy the accumulator around
      __asm__(DYNQUANT_DPBUSD_ASM " %2, %1, %0"
              : "+" DYNQUANT_DPBUSD_REGISTERS(acc)
              : DYNQUANT_DPBUSD_REGISTERS(a), DYNQUANT_DPBUSD_REGISTERS(b));
      return acc;
#endif
    }
  };
  using Exact = Products<Dpbusd>;
};
