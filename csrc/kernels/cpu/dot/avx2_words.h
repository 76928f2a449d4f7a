// The dot product of AVX2 for few rows: bytes are widened to 16 bits for vpmaddwd, so that no product can
// saturate. Included inside the instruction set's namespace and target region, after vector_256.h.

// A weight vector is 8 channels of 4 bytes k0 k1 k2 k3. Seen as 16-bit words, the low bytes are (k0, k2) and
// the high bytes (k1, k3): vpmaddubsw by (1, 0), or a shift, widens them with no shuffle. Activations
// have the same order.
struct Dot {
  static constexpr int kMaxRows = 6;
  template <int kRows>
  static constexpr int kVectors = kRows == 1   ? 8
                                  : kRows == 2 ? 4
                                               : 2;

  static constexpr int kGroupBytes = 8;  // of a packed row: q0 q2 q1 q3 as int16
  static constexpr int32_t kOffset = 0;  // packed value = q + kOffset
  using ZeroPointCompensation = CompensationByProduct;
  static constexpr bool kPlans = false;
  static constexpr int64_t kGroupsOfKBlock = 96;  // 24 KB

  template <int kStep>
  struct Words {
    static constexpr int kActivationsAt = 4 * kStep;

    static V::I weight(V::I bytes) {
      return kStep == 0 ? _mm256_maddubs_epi16(_mm256_set1_epi16(1), bytes) : _mm256_srai_epi16(bytes, 8);
    }

    static V::I multiply_add(V::I acc, V::I a, V::I w) {
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, w));
      // Keeps GCC from adding the products of both steps first, for which registers are lacking.
      __asm__("" : "+x"(acc));
      return acc;
    }
  };
  using Exact = Products<Words<0>, Words<1>>;

  static void store_activations(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    store_words(p, q0, q1);
    store_words(p + 32, q2, q3);
  }

 private:
  static void store_words(uint8_t* p, V::I q0, V::I q1) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xD8);  // groups in order
    const __m256i words =
        _mm256_min_epi16(_mm256_max_epi16(packed, _mm256_set1_epi16(-128)), _mm256_set1_epi16(127));
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5,
                                           2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(words, order));
  }
};
