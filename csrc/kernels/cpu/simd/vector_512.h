// Sixteen fp32 or int32 lanes in a zmm register. Included inside an instruction set's namespace and target
// region.

struct V {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;
  using Mask = __mmask16;

  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static I broadcast(int32_t x) { return _mm512_set1_epi32(x); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static F load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  // Keeps GCC 12 from repeating a load in each instruction that uses its result.
  static F in_register(F x) {
#if !defined(DYNQUANT_EMULATED)
    __asm__("" : "+v"(x));
#endif
    return x;
  }

  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static void store(BFloat16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bfloat16_bits<V>(x)));
  }
  static void store(Float16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c, rounded once
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int count>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, count);
  }
  template <int count>
  static I shift_right(I a) {  // shifts in zeros
    return _mm512_srli_epi32(a, count);
  }

  static I as_int(F x) { return _mm512_castps_si512(x); }
  static F as_float(I x) { return _mm512_castsi512_ps(x); }
  static I round(F x) { return _mm512_cvtps_epi32(x); }  // to nearest even, |x| < 2^31
  static F convert(I x) { return _mm512_cvtepi32_ps(x); }

  static Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask unordered(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
  static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static bool any(Mask mask) { return mask != 0; }
  static F select(Mask mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }

  static int32_t sum_lanes(I x) { return _mm512_reduce_add_epi32(x); }
  static float lowest_lane(F x) { return _mm512_reduce_min_ps(x); }
  static float highest_lane(F x) { return _mm512_reduce_max_ps(x); }

  // (a, b) -> (a + b, a - b) for elements `stride` apart: the swapped pair plus x times 1 or -1, which is
  // exact.
  template <int stride>
  static F butterfly(F x) {
    static_assert(stride == 1 || stride == 2 || stride == 4 || stride == 8);
    constexpr __mmask16 kSecond = stride == 1 ? 0xAAAA : stride == 2 ? 0xCCCC : stride == 4 ? 0xF0F0 : 0xFF00;
    const F sign = _mm512_mask_blend_ps(kSecond, broadcast(1.0f), broadcast(-1.0f));
    if constexpr (stride <= 2) {
      return _mm512_fmadd_ps(x, sign, _mm512_permute_ps(x, stride == 1 ? 0xB1 : 0x4E));
    } else {
      return _mm512_fmadd_ps(x, sign, _mm512_shuffle_f32x4(x, x, stride == 4 ? 0xB1 : 0x4E));
    }
  }

  // x[i][j] -> x[j][i]
  static void transpose(F (&x)[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 4) {  // 4 x 4 blocks within the 128-bit lanes
      const F a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
      const F c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
      t[i] = _mm512_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
      t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
    }
    for (int i = 0; i < 4; ++i) {  // then the lanes
      const F a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x44), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xEE);
      const F c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x44);
      const F d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xEE);
      x[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      x[i + 4] = _mm512_shuffle_f32x4(a, c, 0xDD);
      x[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
      x[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
  }

  // Saturates 64 values to bytes, in order.
  static I bytes(I q0, I q1, I q2, I q3) {
    const I lanes = _mm512_packs_epi16(_mm512_packs_epi32(q0, q1), _mm512_packs_epi32(q2, q3));
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, lanes);
  }
  static void store_bytes(int8_t* p, I q0, I q1, I q2, I q3) {
    _mm512_storeu_si512(p, bytes(q0, q1, q2, q3));
  }
  static I load_bytes(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};
