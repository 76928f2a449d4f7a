// AVX-512 and VNNI intrinsics of csrc/kernels/cpu as plain loops over the lanes, so that a CPU without them
// can run the kernels. Included before a kernel file (-include), compiled with AVX2 alone.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define DYNQUANT_EMULATED

namespace emulated {

template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct Floats {
  float lane[16];
};
struct Ints {
  int32_t lane[16];
};

template <typename Function>
inline __m512 floats(Function f) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.lane[i] = f(i);
  return bits<__m512>(r);
}

template <typename Function>
inline __m512i ints(Function f) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.lane[i] = static_cast<int32_t>(f(i));
  return bits<__m512i>(r);
}

inline float at(const __m512& x, int i) { return bits<Floats>(x).lane[i]; }
inline uint32_t at(const __m512i& x, int i) { return static_cast<uint32_t>(bits<Ints>(x).lane[i]); }
inline int32_t signed_at(const __m512i& x, int i) { return bits<Ints>(x).lane[i]; }

// Adds the products of a's and b's elements to the int32 lane that contains them, without saturation.
template <typename Left, typename Right, typename Vector>
inline Vector add_products(Vector acc, Vector a, Vector b) {
  constexpr int kLanes = sizeof(Vector) / 4, kInLane = 4 / sizeof(Left);
  struct {
    int32_t lane[kLanes];
  } sums = bits<decltype(sums)>(acc);
  struct {
    Left at[kLanes * kInLane];
  } left = bits<decltype(left)>(a);
  struct {
    Right at[kLanes * kInLane];
  } right = bits<decltype(right)>(b);
  for (int i = 0; i < kLanes * kInLane; ++i) {
    sums.lane[i / kInLane] = static_cast<int32_t>(static_cast<uint32_t>(sums.lane[i / kInLane]) +
                                                  static_cast<uint32_t>(left.at[i] * right.at[i]));
  }
  return bits<Vector>(sums);
}

template <typename Vector>
inline Vector dpbusd(Vector acc, Vector a, Vector b) {
  return add_products<uint8_t, int8_t>(acc, a, b);
}

template <typename Vector>
inline Vector dpwssd(Vector acc, Vector a, Vector b) {
  return add_products<int16_t, int16_t>(acc, a, b);
}

inline __m512 halves(__m256 low, __m256 high) {
  struct {
    __m256 half[2];
  } both = {{low, high}};
  return bits<__m512>(both);
}

template <typename Half, typename Whole>
inline Half half(const Whole& x, int which) {
  struct {
    Half half[2];
  } both = bits<decltype(both)>(x);
  return both.half[which];
}

template <typename Wide, typename Narrow>
inline __m512i halves_of_lanes(__m512i a, __m512i b) {
  constexpr int kLane = 16 / sizeof(Wide), kCount = 64 / sizeof(Narrow);
  struct {
    Wide at[kCount / 2];
  } from[2] = {bits<std::remove_reference_t<decltype(from[0])>>(a),
               bits<std::remove_reference_t<decltype(from[0])>>(b)};
  struct {
    Narrow at[kCount];
  } to;
  for (int i = 0; i < kCount; ++i) {
    const int lane = i / (2 * kLane), in_lane = i % (2 * kLane);
    const int32_t value = from[in_lane / kLane].at[lane * kLane + in_lane % kLane];
    constexpr int32_t kMost = std::numeric_limits<Narrow>::max();
    to.at[i] = static_cast<Narrow>(value < -kMost - 1 ? -kMost - 1 : value > kMost ? kMost : value);
  }
  return bits<__m512i>(to);
}

}  // namespace emulated

namespace emulated {
inline __m512 set1_ps(float x) {
  return floats([&](int) { return x; });
}
inline __m512i set1_epi32(int32_t x) {
  return ints([&](int) { return x; });
}
template <typename T>
inline __m512i loadu_si512(const T* p) {
  __m512i x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
inline __m512 loadu_ps(const float* p) {
  __m512 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <typename T>
inline void storeu_si512(T* p, __m512i x) {
  std::memcpy(p, &x, sizeof(x));
}
inline void storeu_ps(float* p, __m512 x) { std::memcpy(p, &x, sizeof(x)); }

inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 min_ps(__m512 a, __m512 b) {
  return floats([&](int i) { return at(a, i) < at(b, i) ? at(a, i) : at(b, i); });
}
inline __m512 max_ps(__m512 a, __m512 b) {
  return floats([&](int i) { return at(a, i) > at(b, i) ? at(a, i) : at(b, i); });
}
inline __m512i add_epi32(__m512i a, __m512i b) {
  return ints([&](int i) { return at(a, i) + at(b, i); });
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
  return ints([&](int i) { return at(a, i) - at(b, i); });
}
inline __m512i mullo_epi32(__m512i a, __m512i b) {
  return ints([&](int i) { return at(a, i) * at(b, i); });
}
inline __m512i max_epi32(__m512i a, __m512i b) {
  return ints([&](int i) { return signed_at(a, i) > signed_at(b, i) ? at(a, i) : at(b, i); });
}
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i slli_epi32(__m512i a, unsigned count) {
  return ints([&](int i) { return at(a, i) << count; });
}
inline __m512i srli_epi32(__m512i a, unsigned count) {
  return ints([&](int i) { return at(a, i) >> count; });
}
inline __m512i castps_si512(__m512 x) { return bits<__m512i>(x); }
inline __m512 castsi512_ps(__m512i x) { return bits<__m512>(x); }
inline __m512i cvtps_epi32(__m512 x) {
  return ints([&](int i) { return static_cast<int32_t>(std::nearbyint(at(x, i))); });
}
inline __m512 cvtepi32_ps(__m512i x) {
  return floats([&](int i) { return static_cast<float>(signed_at(x, i)); });
}
inline __m512i cvtepu16_epi32(__m256i x) {
  uint16_t lanes[16];
  std::memcpy(lanes, &x, sizeof(lanes));
  return ints([&](int i) { return lanes[i]; });
}
inline __m512i cvtepi8_epi32(__m128i x) {
  int8_t lanes[16];
  std::memcpy(lanes, &x, sizeof(lanes));
  return ints([&](int i) { return lanes[i]; });
}
inline __m256i cvtepi32_epi16(__m512i x) {  // truncates
  uint16_t lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = static_cast<uint16_t>(at(x, i));
  return bits<__m256i>(lanes);
}
// Each 128-bit lane is the lane of a, then the lane of b, saturated to half the width.
inline __m512i packs_epi32(__m512i a, __m512i b) { return halves_of_lanes<int32_t, int16_t>(a, b); }
inline __m512i packs_epi16(__m512i a, __m512i b) { return halves_of_lanes<int16_t, int8_t>(a, b); }
inline __m512i setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l,
                          int m, int n, int o, int p) {
  return bits<__m512i>(Ints{{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p}});
}
inline __m512i set1_epi8(int8_t x) {
  return set1_epi32(static_cast<int>(0x01010101u * static_cast<uint8_t>(x)));
}
inline __m512i permutexvar_epi32(__m512i order, __m512i x) {
  return ints([&](int i) { return at(x, static_cast<int>(at(order, i) & 15)); });
}
inline float reduce_min_ps(__m512 x) {
  float least = at(x, 0);
  for (int i = 1; i < 16; ++i) least = at(x, i) < least ? at(x, i) : least;
  return least;
}
inline float reduce_max_ps(__m512 x) {
  float most = at(x, 0);
  for (int i = 1; i < 16; ++i) most = at(x, i) > most ? at(x, i) : most;
  return most;
}
inline __m512 cvtph_ps(__m256i x) {
  return halves(_mm256_cvtph_ps(half<__m128i>(x, 0)), _mm256_cvtph_ps(half<__m128i>(x, 1)));
}
inline __m256i cvtps_ph(__m512 x, int) {
  struct {
    __m128i half[2];
  } both = {{_mm256_cvtps_ph(half<__m256>(x, 0), 0), _mm256_cvtps_ph(half<__m256>(x, 1), 0)}};
  return bits<__m256i>(both);
}
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unordered = std::isnan(at(a, i)) || std::isnan(at(b, i));
    mask |= static_cast<unsigned>(predicate == _CMP_UNORD_Q ? unordered : at(a, i) < at(b, i)) << i;
  }
  return static_cast<__mmask16>(mask);
}
inline __m512 mask_blend_ps(__mmask16 mask, __m512 no, __m512 yes) {
  return floats([&](int i) { return (mask >> i & 1) != 0 ? at(yes, i) : at(no, i); });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return floats([&](int i) { return std::fma(at(a, i), at(b, i), at(c, i)); });
}
inline __m512 permute_ps(__m512 x, int order) {
  return floats([&](int i) { return at(x, i / 4 * 4 + (order >> i % 4 * 2 & 3)); });
}
inline __m512 shuffle_ps(__m512 a, __m512 b, int order) {
  return floats([&](int i) { return at(i % 4 < 2 ? a : b, i / 4 * 4 + (order >> i % 4 * 2 & 3)); });
}
inline __m512 unpacklo_ps(__m512 a, __m512 b) {
  return floats([&](int i) { return at(i % 2 == 0 ? a : b, i / 4 * 4 + i % 4 / 2); });
}
inline __m512 unpackhi_ps(__m512 a, __m512 b) {
  return floats([&](int i) { return at(i % 2 == 0 ? a : b, i / 4 * 4 + 2 + i % 4 / 2); });
}
inline int32_t reduce_add_epi32(__m512i x) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += at(x, i);
  return static_cast<int32_t>(sum);
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int order) {
  return floats([&](int i) { return at(i < 8 ? a : b, (order >> i / 4 * 2 & 3) * 4 + i % 4); });
}
}  // namespace emulated

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd
#undef _mm256_dpbusd_epi32
#define _mm256_dpbusd_epi32 emulated::dpbusd
#undef _mm256_dpwssd_avx_epi32
#define _mm256_dpwssd_avx_epi32 emulated::dpwssd
#undef _mm256_dpwssd_epi32
#define _mm256_dpwssd_epi32 emulated::dpwssd
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::add_epi32
#undef _mm512_add_ps
#define _mm512_add_ps emulated::add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::and_si512
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::castsi512_ps
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::cvtps_ph
#undef _mm512_div_ps
#define _mm512_div_ps emulated::div_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd
#undef _mm512_dpwssd_epi32
#define _mm512_dpwssd_epi32 emulated::dpwssd
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::loadu_si512
#undef _mm512_mask_blend_ps
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#undef _mm512_max_epi32
#define _mm512_max_epi32 emulated::max_epi32
#undef _mm512_max_ps
#define _mm512_max_ps emulated::max_ps
#undef _mm512_min_ps
#define _mm512_min_ps emulated::min_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mul_ps
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 emulated::mullo_epi32
#undef _mm512_or_si512
#define _mm512_or_si512 emulated::or_si512
#undef _mm512_packs_epi16
#define _mm512_packs_epi16 emulated::packs_epi16
#undef _mm512_packs_epi32
#define _mm512_packs_epi32 emulated::packs_epi32
#undef _mm512_permute_ps
#define _mm512_permute_ps emulated::permute_ps
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#undef _mm512_reduce_min_ps
#define _mm512_reduce_min_ps emulated::reduce_min_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::set1_epi32
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated::set1_epi8
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::set1_ps
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps emulated::shuffle_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::srli_epi32
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 emulated::storeu_si512
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated::sub_ps
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps emulated::unpackhi_ps
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps emulated::unpacklo_ps
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::xor_si512
