// Powers of 2 and the softmax of a block of keys. dynquant/reference/softmax.py has the same formulas.
// Included by generic/kernels.h.

// x = n + f for x in [-127, 0]: x + 12583039, that is 1.5 * 2^23 + 127 + x, has n + 127, the exponent field
// of 2^n, as its lowest bits.
struct SplitExponent {
  F power, f;  // 2^n, 0 for n = -127; abs(f) <= 0.5

  DYNQUANT_INLINE explicit SplitExponent(F x) {
    const F shift = V::broadcast(12583039.0f), shifted = V::add(x, shift);
    power = V::as_float(V::shift_left<23>(V::as_int(shifted)));
    f = V::sub(x, V::sub(shifted, shift));
  }
};

// Highest power first.
template <int kCount>
DYNQUANT_INLINE F horner(F f, const float (&coefficients)[kCount]) {
  F total = V::broadcast(coefficients[0]);
  DYNQUANT_UNROLL
  for (int i = 1; i < kCount; ++i) total = V::fma(total, f, V::broadcast(coefficients[i]));
  return total;
}

// 2^x for x <= 0, 0 below -126.5; any value for NaN.
DYNQUANT_INLINE F exp2(F x) {
  constexpr float kExp2[] = {
      0.000153458124f, 0.00133999309f, 0.00961848907f, 0.0555032864f, 0.240226462f, 0.693147182f, 1.0f};
  const SplitExponent split(V::max(x, V::broadcast(-127.0f)));
  return V::mul(horner(split.f, kExp2), split.power);
}

// round(255 * 2^x) - 128 for x <= 0. The sum with 1.5 * 2^23 rounds to an integer, its lowest bits.
DYNQUANT_INLINE I probability(F x) {
  constexpr float kExp2Times255[] = {14.068775177f, 61.865837097f, 176.781555176f, 254.981658936f};
  constexpr int32_t kBits = 0x4b400000;  // of 1.5 * 2^23
  const SplitExponent split(V::max(x, V::broadcast(-16.0f)));
  const F sum = V::fma(horner(split.f, kExp2Times255), split.power, V::broadcast(12582912.0f));
  return V::sub(V::as_int(sum), V::broadcast(kBits + 128));
}

constexpr float kInfinity = __builtin_inff();

// The softmax of one row and one block. Scores are (product * k_scale) * factor, plus the bias if there is
// one, which is -inf where the key takes no part. Writes the probabilities as packed activations to p, their
// sum, and the maximum of the scores: -inf if no key takes part, NaN if a key that does has a score of NaN or
// +inf; all probabilities are then 0. Without bias all scores must be finite.
template <bool kBiased>
DYNQUANT_INLINE void softmax_of_block(const int32_t* products, const float* k_scale, float factor,
                                      const float* bias, uint8_t* p, float* maximum, float* total) {
  constexpr int kVectors = kKeyBlock / W;
  const F of_row = V::broadcast(factor), none = V::broadcast(-kInfinity);
  F scores[kVectors], highest = none;
  typename V::Mask nan = V::unordered(none, none);
  DYNQUANT_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    const F exact = V::mul(V::convert(V::load(products + j * W)), V::load(k_scale + j * W));
    if constexpr (kBiased) {
      const F added = V::load(bias + j * W);
      scores[j] =
          V::select(V::less(added, V::broadcast(-3.4028234664e38f)), none, V::fma(exact, of_row, added));
      nan = V::either(nan, V::unordered(scores[j], scores[j]));
    } else {
      scores[j] = V::mul(exact, of_row);
    }
    highest = V::max(highest, scores[j]);
  }
  *maximum = V::highest_lane(highest);
  F top = V::broadcast(*maximum);
  if constexpr (kBiased) {
    if (V::any(nan) || *maximum == kInfinity) *maximum = __builtin_nanf("");
    if (!(*maximum > -kInfinity)) {
      top = V::broadcast(0.0f);
      for (F& score : scores) score = none;
    }
  }
  I sum = V::broadcast(0);
  DYNQUANT_UNROLL
  for (int j = 0; j < kVectors; j += 4) {
    I q[4];
    DYNQUANT_UNROLL
    for (int i = 0; i < 4; ++i) q[i] = probability(V::sub(scores[j + i], top));
    sum = V::add(sum, V::add(V::add(q[0], q[1]), V::add(q[2], q[3])));
    Dot::store_activations(p + j * W / 4 * Dot::kGroupBytes, q[0], q[1], q[2], q[3]);
  }
  *total = static_cast<float>(V::sum_lanes(sum) + 128 * kKeyBlock);
}

// Probabilities of 0 for a block.
DYNQUANT_INLINE void store_no_probabilities(uint8_t* p) {
  const I zero = V::broadcast(-128);
  for (int j = 0; j < kKeyBlock; j += kChunk) {
    Dot::store_activations(p + j / 4 * Dot::kGroupBytes, zero, zero, zero, zero);
  }
}
