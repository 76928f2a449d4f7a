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

  static DYNQUANT_INLINE F gelu(F x) {
    const F a = V::min(number(13.1875f), magnitude(x));
    const F c = leading_bits(a);
    const F c_plus = V::add(c, number(2.875f));
    const F q = V::mul(V::mul(c, number(0.59375f)), c_plus);
    const F t = V::sub(number(12583038.0f), q);
    const F n = V::sub(number(12583038.0f), t);
    const F rest = V::mul(V::mul(V::sub(a, c), V::add(a, c_plus)), number(0.59375f));
    const F s = exp2_minus_1(V::sub(V::sub(n, q), rest));
    const F z =
        V::mul(a, polynomial(a, 0.385338783f, 0.167495534f, 0.00911017135f, 0.00300565665f, -0.00159929413f,
                             0.000166017009f, -6.13620432e-05f, 1.18250928e-05f, -6.65178106e-07f));
    const F gate = V::add(z, V::mul(s, V::add(number(1.0f), z)));
    return V::sub(relu(x), V::mul(V::add(a, V::mul(a, gate)), power_of_2(t)));
  }

  static DYNQUANT_INLINE F gelu_tanh(F x) {
    const F a = V::min(number(10.03125f), magnitude(x));
    const F c = leading_bits(a);
    const F c_plus = V::add(c, number(2.8125f));
    const F q = V::mul(V::mul(c, number(0.5625f)), c_plus);
    const F g = V::mul(V::mul(V::mul(a, number(0.102943242f)), V::sub(a, number(2.04766059f))),
                       V::sub(a, number(3.41651559f)));
    const F t = V::sub(number(12583039.0f), V::add(q, g));
    const F n = V::sub(number(12583039.0f), t);
    const F rest = V::mul(V::mul(V::sub(a, c), V::add(a, c_plus)), number(0.5625f));
    const F s = exp2_minus_1(V::add(V::add(V::sub(q, n), rest), g));
    return V::sub(relu(x), gated(a, s, power_of_2(t)));
  }

  static DYNQUANT_INLINE F silu(F x) {
    const F a = V::min(number(88.0f), magnitude(x));
    const F t = V::sub(number(12583039.0f), V::mul(a, number(1.44269502f)));
    const F n = V::sub(number(12583039.0f), t);
    const F r = V::sub(V::sub(a, V::mul(n, number(0.693359375f))), V::mul(n, number(-0.000212194442f)));
    const F s = V::mul(
        r, polynomial(r, 1.0f, 0.499999911f, 0.166665047f, 0.0416688211f, 0.00837066211f, 0.00137997477f));
    return V::sub(relu(x), gated(a, s, power_of_2(t)));
  }

 private:
  static DYNQUANT_INLINE F number(float x) { return V::broadcast(x); }

  static DYNQUANT_INLINE F magnitude(F x) {
    return V::as_float(V::bit_and(V::as_int(x), V::broadcast(int32_t{0x7fffffff})));
  }

  // 9 significant bits: products of two such numbers are exact.
  static DYNQUANT_INLINE F leading_bits(F x) {
    return V::as_float(V::bit_and(V::as_int(x), V::broadcast(int32_t{-0x8000})));
  }

  // The lowest bits of t, 127 - n, are the exponent field of 2^-n.
  static DYNQUANT_INLINE F power_of_2(F t) { return V::as_float(V::template shift_left<23>(V::as_int(t))); }

  // c0 + c1 x + x^2 (c2 + c3 x + x^2 (...)): pairs halve the chain of dependent steps.
  template <typename... Coefficients>
  static DYNQUANT_INLINE F polynomial(F x, Coefficients... c) {
    return pairs(x, V::mul(x, x), c...);
  }
  static DYNQUANT_INLINE F pairs(F, F, float c) { return number(c); }
  static DYNQUANT_INLINE F pairs(F x, F, float c0, float c1) {
    return V::add(V::mul(x, number(c1)), number(c0));
  }
  template <typename... Rest>
  static DYNQUANT_INLINE F pairs(F x, F square, float c0, float c1, float c2, Rest... higher) {
    return V::add(V::mul(pairs(x, square, c2, higher...), square), pairs(x, square, c0, c1));
  }

  static DYNQUANT_INLINE F exp2_minus_1(F f) {
    return V::mul(f, polynomial(f, 0.693147182f, 0.240226462f, 0.0555035435f, 0.00961863901f, 0.00133940298f,
                                0.000153021625f));
  }

  // a / (1 + 2^n (1 + s)), power = 2^-n.
  static DYNQUANT_INLINE F gated(F a, F s, F power) {
    return V::div(V::mul(a, power), V::add(V::add(power, number(1.0f)), s));
  }
};

// kCount vectors of V side by side: one function is a chain of some 70 cycles, and a CPU's window of
// instructions is too small to overlap enough of them.
template <typename V, int kCount>
struct MultiVector {
  struct F {
    typename V::F v[kCount];
  };
  struct I {
    typename V::I v[kCount];
  };

#define DYNQUANT_EACH(type, expression)                      \
  type out;                                                  \
  for (int i = 0; i < kCount; ++i) out.v[i] = V::expression; \
  return out
  static DYNQUANT_INLINE F broadcast(float x) { DYNQUANT_EACH(F, broadcast(x)); }
  static DYNQUANT_INLINE I broadcast(int32_t x) { DYNQUANT_EACH(I, broadcast(x)); }
  static DYNQUANT_INLINE F add(F a, F b) { DYNQUANT_EACH(F, add(a.v[i], b.v[i])); }
  static DYNQUANT_INLINE F sub(F a, F b) { DYNQUANT_EACH(F, sub(a.v[i], b.v[i])); }
  static DYNQUANT_INLINE F mul(F a, F b) { DYNQUANT_EACH(F, mul(a.v[i], b.v[i])); }
  static DYNQUANT_INLINE F div(F a, F b) { DYNQUANT_EACH(F, div(a.v[i], b.v[i])); }
  static DYNQUANT_INLINE F fma(F a, F b, F c) { DYNQUANT_EACH(F, fma(a.v[i], b.v[i], c.v[i])); }
  static DYNQUANT_INLINE F min(F a, F b) { DYNQUANT_EACH(F, min(a.v[i], b.v[i])); }
  static DYNQUANT_INLINE F max(F a, F b) { DYNQUANT_EACH(F, max(a.v[i], b.v[i])); }
  static DYNQUANT_INLINE I bit_and(I a, I b) { DYNQUANT_EACH(I, bit_and(a.v[i], b.v[i])); }
  template <int count>
  static DYNQUANT_INLINE I shift_left(I a) {
    DYNQUANT_EACH(I, template shift_left<count>(a.v[i]));
  }
  static DYNQUANT_INLINE I as_int(F a) { DYNQUANT_EACH(I, as_int(a.v[i])); }
  static DYNQUANT_INLINE F as_float(I a) { DYNQUANT_EACH(F, as_float(a.v[i])); }
#undef DYNQUANT_EACH
};
