// The dot product of VNNI on ymm registers, one instruction in two encodings: DYNQUANT_DPBUSD is the intrinsic of
// the one at hand, DYNQUANT_DPBUSD_ASM its name, DYNQUANT_DPBUSD_REGISTERS the registers it can use. Included inside
// an instruction set's namespace and target region, after vector_256.h.

// vpdpbusd multiplies unsigned by signed bytes: the operand is q + 128, and 128 * weight_sum is taken off
// again.
struct Dot {
  static constexpr int kMaxRows = 6;
  template <int kRows>
  static constexpr int kVectors = kRows == 1   ? 8
                                  : kRows == 2 ? 4
                                               : 2;

  static constexpr int kGroupBytes = 4;    // of an operand row, for 4 elements
  static constexpr int32_t kOffset = 128;  // stored operand = q + kOffset
  static constexpr bool kPlans = false;
  static constexpr int64_t kPartGroups = 96;  // 24 KB

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

  static void store_operand(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    const V::I offset = _mm256_set1_epi32(kOffset);
    const __m256i words01 = _mm256_packs_epi32(_mm256_add_epi32(q0, offset), _mm256_add_epi32(q1, offset));
    const __m256i words23 = _mm256_packs_epi32(_mm256_add_epi32(q2, offset), _mm256_add_epi32(q3, offset));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words01, words23), order));
  }
};
