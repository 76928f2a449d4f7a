// Four fp32 or int32 lanes in the compiler's portable vectors: SSE2 on x86-64.

struct V {
  static constexpr int kLanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  using Mask = I;

  static F broadcast(float x) { return F{x, x, x, x}; }
  static I broadcast(int32_t x) { return I{x, x, x, x}; }

  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static I load(const int32_t* p) {
    I x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static F load(const BFloat16* p) {
    I bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i].bits) << 16);
    return as_float(bits);
  }
  static F load(const Float16* p) {
    F x;
    for (int i = 0; i < kLanes; ++i) x[i] = from_half(p[i].bits);
    return x;
  }

  static F in_register(F x) { return x; }

  static void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static void store(int32_t* p, I x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static void store(BFloat16* p, F x) {
    const I bits = bfloat16_bits<V>(x);
    for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(bits[i]);
  }
  static void store(Float16* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = to_half(x[i]);
  }

  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) {  // a b + c, rounded once
    F out;
    for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
  }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static I add(I a, I b) { return as_signed(as_unsigned(a) + as_unsigned(b)); }
  static I sub(I a, I b) { return as_signed(as_unsigned(a) - as_unsigned(b)); }
  static I mul(I a, I b) { return as_signed(as_unsigned(a) * as_unsigned(b)); }
  static I max(I a, I b) { return a > b ? a : b; }
  static I bit_and(I a, I b) { return a & b; }
  static I bit_or(I a, I b) { return a | b; }
  static I bit_xor(I a, I b) { return a ^ b; }
  template <int count>
  static I shift_left(I a) {
    return as_signed(as_unsigned(a) << count);
  }
  template <int count>
  static I shift_right(I a) {  // shifts in zeros
    return as_signed(as_unsigned(a) >> count);
  }

  static I as_int(F x) { return reinterpret_cast<I>(x); }
  static F as_float(I x) { return reinterpret_cast<F>(x); }
  static I round(F x) {  // to nearest even, |x| < 2^31
    I rounded;
    for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(__builtin_nearbyintf(x[i]));
    return rounded;
  }
  static F convert(I x) { return __builtin_convertvector(x, F); }

  static Mask less(F a, F b) { return a < b; }
  static Mask unordered(F a, F b) { return (a != a) | (b != b); }
  static Mask either(Mask a, Mask b) { return a | b; }
  static bool any(Mask mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
  static F select(Mask mask, F yes, F no) { return mask ? yes : no; }

  static int32_t sum_lanes(I x) { return x[0] + x[1] + x[2] + x[3]; }
  static float lowest_lane(F x) { return least(least(x[0], x[1]), least(x[2], x[3])); }
  static float highest_lane(F x) { return -lowest_lane(-x); }

  // (a, b) -> (a + b, a - b) for elements `stride` apart.
  template <int stride>
  static F butterfly(F x) {
    static_assert(stride == 1 || stride == 2);
    if constexpr (stride == 1) return F{x[0] + x[1], x[0] - x[1], x[2] + x[3], x[2] - x[3]};
    return F{x[0] + x[2], x[1] + x[3], x[0] - x[2], x[1] - x[3]};
  }

  // x[i][j] -> x[j][i]
  static void transpose(F (&x)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const float below = x[i][j];
        x[i][j] = x[j][i];
        x[j][i] = below;
      }
    }
  }

  // Saturates 16 values to bytes, in order.
  static void store_bytes(int8_t* p, I q0, I q1, I q2, I q3) {
    for (int i = 0; i < kLanes; ++i) {
      p[i] = to_byte(q0[i]);
      p[i + 4] = to_byte(q1[i]);
      p[i + 8] = to_byte(q2[i]);
      p[i + 12] = to_byte(q3[i]);
    }
  }
  static I load_bytes(const int8_t* p) { return I{p[0], p[1], p[2], p[3]}; }

 private:
  static float least(float a, float b) { return a < b ? a : b; }
  static int8_t to_byte(int32_t q) { return static_cast<int8_t>(q < -128 ? -128 : q > 127 ? 127 : q); }

  typedef uint32_t U __attribute__((vector_size(16)));
  static U as_unsigned(I x) { return reinterpret_cast<U>(x); }
  static I as_signed(U x) { return reinterpret_cast<I>(x); }

  static float from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    uint32_t bits;
    if (exponent == 31) {
      bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent > 0) {
      bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {  // fraction * 2^-24, exact
      const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
      return sign != 0 ? -magnitude : magnitude;
    }
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return x;
  }

  // An fp32 addition rounds to nearest even: the last bit of the added power of two is that of the half.
  static uint16_t to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (bits < 0x38800000u) {                        // below 2^-14: half's subnormals, in steps of 2^-24
      float magnitude;
      __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
      const float shifted = magnitude + 0.5f;
      uint32_t low;
      __builtin_memcpy(&low, &shifted, sizeof(low));
      return static_cast<uint16_t>(sign | (low - 0x3f000000u));
    }
    const uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1u);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
  }
};
