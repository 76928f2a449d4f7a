// The dot product of VNNI on ymm registers: see vnni.h.
#include "cpu/dot/vnni.h"

struct Dot : VnniDot {
  template <int kRows>
  static constexpr int kVectors = kRows == 1   ? 8
                                  : kRows == 2 ? 4
                                               : 2;

  static constexpr int64_t kGroupsOfKBlock = 96;  // 24 KB

  static void store_activations(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    const V::I offset = _mm256_set1_epi32(kOffset);
    const __m256i words01 = _mm256_packs_epi32(_mm256_add_epi32(q0, offset), _mm256_add_epi32(q1, offset));
    const __m256i words23 = _mm256_packs_epi32(_mm256_add_epi32(q2, offset), _mm256_add_epi32(q3, offset));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words01, words23), order));
  }
};
