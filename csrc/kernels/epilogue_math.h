// The epilogue functions as fixed sequences of fp32 operations, once for all CPU instruction sets and CUDA.
// dynquant/reference/epilogue.py is the same text in PyTorch and explains it; docs/epilogue.md derives it.
//
// Included inside the namespace (and target region) of the user, who defines DYNQUANT_INLINE, the specifiers
// of a forced inline function. V offers the types F (fp32) and I (int32), of any number of lanes, and
//   F broadcast(float);  I broadcast(int32_t);
//   F add, sub, mul, div(F, F);            rounded to nearest even, never contracted, no flush to zero
//   F fma(F a, F b, F c);                  a b + c, rounded once
//   F min(F a, F b);                       a < b ? a : b, so a NaN in b stays
//   F max(F a, F b);                       a > b ? a : b
//   I bit_and(I, I);  I shift_left<count>(I);  I as_int(F);  F as_float(I);

template <typename V>
struct EpilogueMath {
  using F = typename V::F;

  // -0 and NaN stay.
  static DYNQUANT_INLINE F relu(F x) { return V::max(number(0.0f), x); }

  // The minimum gives n = 99, with which the last power is 0.
  static DYNQUANT_INLINE F gelu(F x) {
    const F a = V::min(number(12.75f), magnitude(x));
    const F r = polynomial(a, -1.15115416f, -0.458851129f, -0.0533757247f, 0.00809101481f, -0.000779657916f,
                           3.48693065e-05f);
    const F first = number(12582912.0f + 256 + 99);  // 256: the sign bit of the power
    const F t = V::fma(a, r, first);
    const F fraction = V::fma(a, r, V::sub(first, t));
    const F minus_gate = V::mul(exp2_of_fraction(fraction, 0x1p27f), power_of_2(t));
    return V::fma(a, minus_gate, relu(x));
  }

  static DYNQUANT_INLINE F gelu_tanh(F x) {
    const F low = V::max(number(-10.0625f), x), w = V::min(number(10.03125f), low);
    return gated(low, w, V::fma(V::mul(w, w), number(-0.102943242f), number(-2.3022082f)));
  }

  static DYNQUANT_INLINE F silu(F x) {
    const F low = V::max(number(-88.75f), x);
    return gated(low, V::min(number(88.0f), low), number(-1.44269502f));
  }

  static DYNQUANT_INLINE F quick_gelu(F x) {
    const F low = V::max(number(-52.125f), x);
    return gated(low, V::min(number(51.75f), low), number(-2.45546699f));
  }

  // The gates of recurrent layers.
  static DYNQUANT_INLINE F sigmoid(F x) {
    const F w = V::min(number(88.0f), V::max(number(-88.75f), x));
    return gated(number(1.0f), w, number(-1.44269502f));
  }

  static DYNQUANT_INLINE F tanh(F x) {
    const F w = V::min(number(9.5f), V::max(number(-9.5f), x)), slope = number(2.88539004f);
    const F first = number(kOne), t = V::fma(w, slope, first);
    const F fraction = V::fma(w, slope, V::sub(first, t)), power = power_of_2(t);
    const F of_fraction = V::mul(fraction, polynomial(fraction, 0.693147004f, 0.240222469f, 0.0555071086f,
                                                      0.00967129413f, 0.00132695795f));
    const F m = V::fma(power, of_fraction, V::sub(power, number(1.0f)));
    return V::div(m, V::add(m, number(2.0f)));
  }

  // 2^x for x in [-127.5, 127.5): 0 below -126.5, 1 at 0.
  static DYNQUANT_INLINE F exp2(F x) {
    const F first = number(kOne), t = V::add(x, first);
    return V::mul(exp2_of_fraction(V::sub(x, V::sub(t, first)), 1.0f), power_of_2(t));
  }

 private:
  static DYNQUANT_INLINE F number(float x) { return V::broadcast(x); }

  static DYNQUANT_INLINE F magnitude(F x) {
    return V::as_float(V::bit_and(V::as_int(x), V::broadcast(int32_t{0x7fffffff})));
  }

  // 1.5 * 2^23 + 127: floats of this size are the integers, so a sum with it is rounded to one, and the
  // lowest 9 bits of kOne + n are sign and exponent of 2^n.
  static constexpr float kOne = 12583039.0f;

  static DYNQUANT_INLINE F power_of_2(F t) { return V::as_float(V::template shift_left<23>(V::as_int(t))); }

  // c0 + x (c1 + x (c2 + ...)).
  static DYNQUANT_INLINE F polynomial(F, float c) { return number(c); }
  template <typename... Higher>
  static DYNQUANT_INLINE F polynomial(F x, float c, Higher... higher) {
    return V::fma(polynomial(x, higher...), x, number(c));
  }

  // factor * 2^f for |f| <= 1/2; factor is a power of two.
  static DYNQUANT_INLINE F exp2_of_fraction(F f, float factor) {
    return polynomial(f, factor, factor * 0.693147004f, factor * 0.240222469f, factor * 0.0555071086f,
                      factor * 0.00967129413f, factor * 0.00132695795f);
  }

  // x / (1 + 2^(w * slope)); w is x within the range in which 2^(w * slope) is 0, normal or inf.
  static DYNQUANT_INLINE F gated(F x, F w, F slope) {
    const F first = number(kOne), t = V::fma(w, slope, first);
    const F fraction = V::fma(w, slope, V::sub(first, t));
    return V::div(x, V::fma(exp2_of_fraction(fraction, 1.0f), power_of_2(t), number(1.0f)));
  }
};
