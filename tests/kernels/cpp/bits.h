// Comparisons by bits, edge values, and conversions as scalar code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace kernel_tests {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The same bits, or both NaN: the sign and payload of a NaN are the hardware's choice.
inline bool same_bits(float a, float b) {
  return bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

// Zeros, denormals, halves to round, bounds of bf16, fp16 and int32, infinities, NaN; each with both signs.
inline std::vector<float> edge_floats() {
  std::vector<float> values = {0.0f,
                               0x1p-149f,
                               0x1.fffffcp-127f,
                               0x1p-126f,
                               0x1p-24f,
                               0x1p-25f,
                               0x1.000002p-25f,
                               0x1.8p-24f,
                               0x1.ffcp-15f,
                               0x1.ffep-15f,
                               0x1p-14f,
                               0.1f,
                               0.49999997f,
                               0.5f,
                               0.50000006f,
                               1.0f,
                               1.00390625f,
                               1.01171875f,
                               1.00048828125f,
                               1.00146484375f,
                               1.5f,
                               2.5f,
                               3.0f,
                               126.5f,
                               127.5f,
                               128.5f,
                               8388607.5f,
                               16777217.0f,
                               65504.0f,
                               65519.996f,
                               65520.0f,
                               0x1.fffffep30f,
                               0x1.fefffep127f,
                               0x1.ffp127f,
                               0x1.fffffep127f,
                               INFINITY,
                               NAN,
                               bit_cast<float>(0x7f800001u),
                               bit_cast<float>(0x7fffffffu)};
  for (size_t i = values.size(); i-- > 0;) values.push_back(-values[i]);
  return values;
}

inline std::vector<int32_t> edge_ints() {
  return {0,           1,          -1,        2,        -2,        127,        128,
          -128,        -129,       255,       256,      32767,     32768,      -32768,
          -32769,      65535,      65536,     16777217, -16777217, 0x7fffffff, -0x7fffffff - 1,
          -0x7fffffff, 0x55555555, 0x0f0f0f0f};
}

// Edge values and random bit patterns.
inline std::vector<float> test_floats(size_t random, uint32_t seed) {
  std::vector<float> values = edge_floats();
  std::mt19937 generator(seed);
  for (size_t i = 0; i < random; ++i) values.push_back(bit_cast<float>(static_cast<uint32_t>(generator())));
  return values;
}

inline float float_of_bfloat16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline float float_of_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// The nearest of the 16-bit numbers that Decode decodes, ties to even bits; NaN for NaN. By search: no trick
// of bits in common with the kernels.
template <float (*decode)(uint16_t)>
uint16_t nearest_16(float x, uint16_t infinity, uint16_t nan) {
  if (std::isnan(x)) return nan;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (std::isinf(x)) return sign | infinity;
  uint16_t low = 0, high = infinity;  // decode(low) <= magnitude, and high is beyond it
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (static_cast<double>(decode(middle)) <= magnitude ? low : high) = middle;
  }
  // Infinity stands where the next finite number would.
  const double below = decode(low);
  const double above = high == infinity ? 2.0 * below - decode(static_cast<uint16_t>(low - 1)) : decode(high);
  const double from_below = magnitude - below, from_above = above - magnitude;
  const bool up = from_above < from_below || (from_above == from_below && (low & 1) != 0);
  return sign | (up ? high : low);
}

inline uint16_t bfloat16_of(float x) { return nearest_16<float_of_bfloat16>(x, 0x7f80, 0x7fc0); }
inline uint16_t float16_of(float x) { return nearest_16<float_of_float16>(x, 0x7c00, 0x7e00); }

}  // namespace kernel_tests
