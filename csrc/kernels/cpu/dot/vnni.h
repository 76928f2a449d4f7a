// The dot product of VNNI, one instruction in several encodings: DYNQUANT_DPBUSD is its intrinsic,
// DYNQUANT_DPBUSD_ASM its name, DYNQUANT_DPBUSD_REGISTERS its register class, DYNQUANT_DPWSSD the intrinsic
// for words. Included inside an instruction set's namespace and target region, after its vector_*.h.

// vpdpbusd multiplies unsigned by signed bytes: packed values are q + 128, and 128 * weight_sum is
// subtracted.
struct VnniDot {
  static constexpr int kMaxRows = 6;

  static constexpr int kGroupBytes = 4;    // of a packed row, for 4 elements
  static constexpr int32_t kOffset = 128;  // packed value = q + kOffset
  static constexpr bool kPlans = false;

  struct Dpbusd {
    static constexpr int kActivationsAt = 0;

    static V::I weight(V::I w) { return w; }

    static V::I multiply_add(V::I acc, V::I a, V::I b) {
#if defined(DYNQUANT_EMULATED)
      return DYNQUANT_DPBUSD(acc, a, b);
#else  // with the intrinsic GCC 12 copies accumulators
      __asm__(DYNQUANT_DPBUSD_ASM " %2, %1, %0"
              : "+" DYNQUANT_DPBUSD_REGISTERS(acc)
              : DYNQUANT_DPBUSD_REGISTERS(a), DYNQUANT_DPBUSD_REGISTERS(b));
      return acc;
#endif
    }
  };
  using Exact = Products<Dpbusd>;

  // acc - offset * sum in one vpdpwssd, which multiplies two words and adds: a sum is 128 * high + low, and
  // its factors are -128 * offset and -offset.
  struct ZeroPointCompensation {
    static constexpr int64_t kMaxK = (int64_t{1} << 22) / 128;  // high is a word

    static V::I prepare_sums(V::I sum) {
      const V::I high = V::bit_and(V::shift_left<9>(sum), V::broadcast(~0xffff));
      return V::bit_or(high, V::bit_and(sum, V::broadcast(127)));
    }

    static V::I prepare_offset(int32_t offset) {  // in [0, 255]
      const uint32_t taken = static_cast<uint32_t>(-offset);
      return V::broadcast(static_cast<int32_t>(taken << 23 | (taken & 0xffff)));
    }

    static V::I subtract(V::I acc, V::I offset, V::I sum) { return DYNQUANT_DPWSSD(acc, offset, sum); }
  };
};
