// Shared by all vector types; a template over V, so that each instruction set has its own copy.

// fp32 to bf16: round to nearest even on the bits (the hardware's conversion flushes denormals); NaN stays
// NaN.
template <typename V>
typename V::I bfloat16_bits(typename V::F x) {
  const typename V::I bits = V::as_int(x);
  const typename V::I odd = V::bit_and(V::template shift_right<16>(bits), V::broadcast(1));
  const typename V::I rounded = V::template shift_right<16>(V::add(bits, V::add(odd, V::broadcast(0x7fff))));
  const typename V::F result =
      V::select(V::unordered(x, x), V::as_float(V::broadcast(0x7fc0)), V::as_float(rounded));
  return V::as_int(result);
}
