// The dot product of VNNI, one instruction in several encodings: DYNQUANT_DPBUSD is the intrinsic of the one at hand,
// DYNQUANT_DPBUSD_ASM its name, DYNQUANT_DPBUSD_REGISTERS the registers it can use, DYNQUANT_DPWSSD the intrinsic for
// words. Included inside an instruction set's namespace and target region, after its vector_*.h.

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

  // acc - offset * sum in one instruction: a sum is 128 * high + low, a word each, and so is -offset with -128 * offset.
  struct TakenOff {
    static constexpr int64_t kMaxK = (int64_t{1} << 22) / 127;  // high is a word

    static V::I of_sums(V::I sum) {
      const V::I high = V::bit_and(V::shift_left<9>(sum), V::broadcast(~0xffff));
      return V::bit_or(high, V::bit_and(sum, V::broadcast(127)));
    }

    static V::I of_offset(int32_t offset) {  // in [0, 255]
      const uint32_t taken = static_cast<uint32_t>(-offset);
      return V::broadcast(static_cast<int32_t>(taken << 23 | (taken & 0xffff)));
    }

    static V::I from(V::I acc, V::I offset, V::I sum) { return DYNQUANT_DPWSSD(acc, offset, sum); }
  };
};
