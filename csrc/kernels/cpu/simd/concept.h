// The requirements on a vector type V, checked when a kernel file is compiled as C++20. tests/kernels/cpp
// checks what each function returns.
#pragma once

#include <cstdint>

#include "types.h"

#if defined(__cpp_concepts) && __cpp_concepts >= 201907L
#define DYNQUANT_HAS_CONCEPTS 1

namespace dynquant::cpu {

// std::same_as, without the warnings about attributes of vector types as its arguments.
template <typename A, typename B>
concept Same = __is_same(A, B);

// Loads and stores of kLanes adjacent elements at any address.
template <typename V, typename T, typename Register>
concept LoadsAndStores = requires(const T* from, T* to, Register x) {
  { V::load(from) } -> Same<Register>;
  { V::store(to, x) } -> Same<void>;
};

template <typename V, typename F = typename V::F>
concept FloatArithmetic = requires(F a, F b, F c) {
  // Each rounds once to nearest even; none is contracted with another.
  { V::add(a, b) } -> Same<F>;
  { V::sub(a, b) } -> Same<F>;
  { V::mul(a, b) } -> Same<F>;
  { V::div(a, b) } -> Same<F>;
  { V::fma(a, b, c) } -> Same<F>;
  { V::min(a, b) } -> Same<F>;           // a < b ? a : b, so a NaN in b stays
  { V::max(a, b) } -> Same<F>;           // a > b ? a : b
  { V::lowest_lane(a) } -> Same<float>;  // without NaN
  { V::highest_lane(a) } -> Same<float>;
};

template <typename V>
concept Transposes = requires(typename V::F (&rows)[V::kLanes]) {
  { V::transpose(rows) } -> Same<void>;  // lane j of row i and lane i of row j change places
};

template <typename V, typename I = typename V::I>
concept IntArithmetic = requires(I a, I b) {
  { V::add(a, b) } -> Same<I>;  // wraps, as do sub and mul
  { V::sub(a, b) } -> Same<I>;
  { V::mul(a, b) } -> Same<I>;
  { V::max(a, b) } -> Same<I>;
  { V::sum_lanes(a) } -> Same<int32_t>;
  { V::bit_and(a, b) } -> Same<I>;
  { V::bit_or(a, b) } -> Same<I>;
  { V::bit_xor(a, b) } -> Same<I>;
  { V::template shift_left<9>(a) } -> Same<I>;
  { V::template shift_right<16>(a) } -> Same<I>;  // shifts in zeros
};

template <typename V, typename F = typename V::F, typename I = typename V::I>
concept Conversions = requires(F f, I i, const int8_t* from, int8_t* to) {
  { V::broadcast(0.0f) } -> Same<F>;
  { V::broadcast(int32_t{0}) } -> Same<I>;
  { V::as_int(f) } -> Same<I>;  // the bits
  { V::as_float(i) } -> Same<F>;
  { V::round(f) } -> Same<I>;  // to nearest even, |f| < 2^31
  { V::convert(i) } -> Same<F>;
  { V::in_register(f) } -> Same<F>;  // f, which no later instruction loads again
  { V::load_bytes(from) } -> Same<I>;
  { V::store_bytes(to, i, i, i, i) } -> Same<void>;  // saturates 4 kLanes values, in order
};

template <typename V, typename F = typename V::F, typename Mask = typename V::Mask>
concept Comparisons = requires(F a, F b, Mask mask) {
  { V::less(a, b) } -> Same<Mask>;  // false with a NaN
  { V::unordered(a, b) } -> Same<Mask>;
  { V::either(mask, mask) } -> Same<Mask>;
  { V::any(mask) } -> Same<bool>;
  { V::select(mask, a, b) } -> Same<F>;  // a where the mask is set
};

// (a, b) -> (a + b, a - b) for elements `stride` apart: for each power of two below kLanes.
template <typename V, int stride = V::kLanes / 2>
constexpr bool has_butterflies() {
  if constexpr (stride == 0) {
    return true;
  } else if constexpr (requires(typename V::F x) {
                         { V::template butterfly<stride>(x) } -> Same<typename V::F>;
                       }) {
    return has_butterflies<V, stride / 2>();
  } else {
    return false;
  }
}

template <typename V>
concept VectorType =
    V::kLanes >= 4 && (V::kLanes & (V::kLanes - 1)) == 0 && FloatArithmetic<V> && IntArithmetic<V> &&
    Conversions<V> && Comparisons<V> && Transposes<V> && has_butterflies<V>() &&
    LoadsAndStores<V, float, typename V::F> && LoadsAndStores<V, BFloat16, typename V::F> &&
    LoadsAndStores<V, Float16, typename V::F> && LoadsAndStores<V, int32_t, typename V::I>;

}  // namespace dynquant::cpu
#endif
