// The dot product of AVX2, exact for all 8 bits. Included inside the instruction set's namespace and target region,
// after vector_256.h.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two neighbouring products in 16 bits, where they may saturate.
// Whether they can is seen from the activations alone, for any weights in [-127, 127]:
//
//   operand               vpmaddubsw of           cannot leave 16 bits where, of the activations that are added,
//   signed:   q           (w + 128, q)            those > 0 add up to <= 128, those < 0 to >= -128  (255 * 128 = 32640)
//   unsigned: q + 128     (q + 128, w)            all add up to <= 256                              (256 * 127 = 32512)
//
// Signed suits what lies around zero, unsigned what an activation function has cut off below. The sums are checked once
// for the rows of a tile, and serve all output channels. Each group of 4 along K then takes the cheapest product that
// is exact for it; the bits are the same whichever it is:
//
//   quads   two groups in turn, their words added before they are widened    5 instructions for 2 x 32 products
//   pairs   vpmaddubsw, vpmaddwd by ones, vpaddd                             3 for 32
//   rest    signed: |q| times w with q's sign, of which two always fit       4 for 32
//           unsigned: even and odd bytes by themselves, widened to 16 bits   4 for 32, and the widening

// The places of the bits that are set in a byte, in order.
struct BitsOf {
  uint8_t places[256][8] = {};

  constexpr BitsOf() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0, n = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) places[byte][n++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
constexpr BitsOf kBitsOf;

alignas(32) constexpr int16_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

struct Dot {
  // 2 x 4: 8 accumulators + 4 w + 1 a + 1 product + 2 constants of 16 registers. No more rows: the fewer there are, the
  // more of their groups take the cheap products. One row is bound by the reading of the weight.
  static constexpr int kMaxRows = 2;
  template <int kRows>
  static constexpr int kVectors = kRows == 1 ? 8 : 4;

  static constexpr int kGroupBytes = 4;  // of an operand row, for 4 elements
  static constexpr int32_t kOffset = 0;  // stored operand = q + kOffset
  using TakenOff = TakenOffByProduct;

  static void store_operand(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    V::store_bytes(reinterpret_cast<int8_t*>(p), q0, q1, q2, q3);
  }

  // ---- products of a group ----

  // w + 128 as unsigned bytes, or w again.
  static V::I flip(V::I w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }

  template <bool kSigned>
  struct Pairs {
    static constexpr int kOperandAt = 0;

    static V::I weight(V::I w) { return kSigned ? flip(w) : w; }
    static V::I weight_of_flipped(V::I w) { return kSigned ? w : flip(w); }

    static V::I multiply_add(V::I acc, V::I a, V::I w) { return add_words(acc, words(a, w)); }

    // Of a group and the next one.
    static void multiply_add_two(V::I& acc, const V::I (&a)[2], V::I w0, V::I w1) {
      acc = add_words(acc, _mm256_add_epi16(words(a[0], w0), words(a[1], w1)));
    }

    // For two rows, as one piece: GCC 12 would spill accumulators to have more products at a time.
    static void multiply_add_two(V::I& acc0, V::I& acc1, const V::I (&a0)[2], const V::I (&a1)[2], V::I w0,
                                 V::I w1) {
      V::I sum0 = acc0, sum1 = acc1, first, second;  // locals, or GCC keeps the accumulators in memory
#define DYNQUANT_SIGNED(a, w, to) "vpmaddubsw %[" a "], %[" w "], %[" to "]\n\t"
#define DYNQUANT_UNSIGNED(a, w, to) "vpmaddubsw %[" w "], %[" a "], %[" to "]\n\t"
#define DYNQUANT_ADD_TWO(WORDS)                                                                   \
  __asm__ volatile(                                                                               \
      WORDS("a00", "w0", "first") WORDS("a01", "w1", "second") /* row 0 */                        \
      WORDS("a10", "w0", "w0") WORDS("a11", "w1", "w1")        /* row 1 */                        \
      "vpaddw %[second], %[first], %[first]\n\t"                                                  \
      "vpaddw %[w1], %[w0], %[w0]\n\t"                                                            \
      "vpmaddwd %[ones], %[first], %[first]\n\t"                                                  \
      "vpmaddwd %[ones], %[w0], %[w0]\n\t"                                                        \
      "vpaddd %[first], %[acc0], %[acc0]\n\t"                                                     \
      "vpaddd %[w0], %[acc1], %[acc1]"                                                            \
      : [acc0] "+x"(sum0), [acc1] "+x"(sum1), [w0] "+x"(w0), [w1] "+x"(w1), [first] "=&x"(first), \
        [second] "=&x"(second)                                                                    \
      : [a00] "x"(a0[0]), [a01] "x"(a0[1]), [a10] "x"(a1[0]), [a11] "x"(a1[1]), [ones] "m"(kOnes))
      if constexpr (kSigned) {
        DYNQUANT_ADD_TWO(DYNQUANT_SIGNED);
      } else {
        DYNQUANT_ADD_TWO(DYNQUANT_UNSIGNED);
      }
#undef DYNQUANT_ADD_TWO
#undef DYNQUANT_UNSIGNED
#undef DYNQUANT_SIGNED
      acc0 = sum0;
      acc1 = sum1;
    }

   private:
    static V::I words(V::I a, V::I w) {
      return kSigned ? _mm256_maddubs_epi16(w, a) : _mm256_maddubs_epi16(a, w);
    }
  };

  // Right for any signed operand: 2 * 128 * 127 = 32512.
  struct SignedProduct {
    static constexpr int kOperandAt = 0;

    static V::I weight(V::I w) { return w; }
    static V::I weight_of_flipped(V::I w) { return flip(w); }

    static V::I multiply_add(V::I acc, V::I a, V::I w) {
      return add_words(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a)));
    }
  };

  // Right for any unsigned operand: the even bytes, or the odd ones, as 16-bit words.
  template <bool kOdd>
  struct UnsignedProduct {
    static constexpr int kOperandAt = 0;

    static V::I weight(V::I w) { return _mm256_srai_epi16(kOdd ? w : _mm256_slli_epi16(w, 8), 8); }
    static V::I weight_of_flipped(V::I w) { return weight(flip(w)); }

    static V::I multiply_add(V::I acc, V::I a, V::I w) {
      const V::I words = kOdd ? _mm256_srli_epi16(a, 8) : _mm256_and_si256(a, _mm256_set1_epi16(0xff));
      return add_to(acc, _mm256_madd_epi16(words, w));
    }
  };

  using Exact = Products<SignedProduct>;  // of the operand as it is stored

  // ---- which groups take which ----

  static constexpr bool kPlans = true;

  // K is worked on in parts of whole 8 groups, whose weights fit L1.
  static constexpr int64_t kPartGroups = 192;

  // Groups by their place in a part. Eight places are written at a time, of which `count` grows by those that belong.
  template <int64_t kMost>
  struct List {
    int64_t count;
    uint16_t places[kMost + 8];

    void clear() { count = 0; }

    void append(int64_t first, int which) {
      const __m128i bits =
          _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitsOf.places[which])));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(places + count),
                       _mm_add_epi16(bits, _mm_set1_epi16(static_cast<int16_t>(first))));
      count += __builtin_popcount(static_cast<unsigned>(which));
    }
  };

  // Of the rows of a tile; behind it lie its parts.
  struct Plan {
    int32_t offset;           // operand = q + offset: 0 signed, 128 unsigned
    int32_t start[kMaxRows];  // of a row's accumulators: takes off what w + 128 adds
    int32_t groups_of_part;
  };
  struct Part {
    List<kPartGroups / 2> quads;  // the first group of each two
    List<kPartGroups> pairs, rest;
  };

  static bool takes_flipped(const Plan& plan) { return plan.offset == 0; }

  static int64_t groups_of_part(int64_t groups) {
    const int64_t parts = (groups + kPartGroups - 1) / kPartGroups;
    return parts == 0 ? 8 : round_up((groups + parts - 1) / parts, 8);
  }

  static int64_t plan_bytes(int64_t k) {
    const int64_t groups = (k + 3) / 4, part = groups_of_part(groups);
    return round_up(sizeof(Plan) + (groups + part - 1) / part * sizeof(Part), 64);
  }

  // Of `rows` rows of stored operand, which becomes what the plan says.
  static void make_plan(uint8_t* a, int64_t stride, int rows, int64_t k, Plan& plan) {
    rows == 1 ? make_plan_of<1>(a, stride, k, plan) : make_plan_of<2>(a, stride, k, plan);
  }

  // Adds the products of the part that begins at `group`; its weights begin at tile.b. Meanwhile `ahead` fetches.
  template <typename Accumulators, typename Tile, typename Ahead>
  DYNQUANT_INLINE static void add(const Plan& plan, int64_t group, Accumulators& acc, const uint8_t* a,
                                  int64_t stride, const Tile& tile, Ahead ahead) {
    const Part& part = part_of(plan, group);
    if (plan.offset == 0) {
      add_listed<Pairs<true>>(part, acc, a, stride, tile, ahead, Products<SignedProduct>());
    } else {
      add_listed<Pairs<false>>(part, acc, a, stride, tile, ahead,
                               Products<UnsignedProduct<false>, UnsignedProduct<true>>());
    }
  }

 private:
  // In place: from the intrinsic GCC 12 makes copies of accumulators, and adds products first, for which it has no
  // registers left.
  static V::I add_to(V::I acc, V::I x) {
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
    return acc;
  }

  static V::I add_words(V::I acc, V::I words) {
    return add_to(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
  }

  static Part& part_of(const Plan& plan, int64_t group) {
    return const_cast<Part*>(reinterpret_cast<const Part*>(&plan + 1))[group / plan.groups_of_part];
  }

  template <typename Pair, typename Accumulators, typename Tile, typename Ahead, typename Rest>
  DYNQUANT_INLINE static void add_listed(const Part& part, Accumulators& acc, const uint8_t* a,
                                         int64_t stride, const Tile& tile, Ahead ahead, Rest rest) {
    ahead.over(part.quads.count + part.pairs.count + part.rest.count);
    const auto for_each = [&](const auto& list, auto add) DYNQUANT_INLINE_LAMBDA {
      for (int64_t i = 0; i < list.count; ++i) {
        const int64_t group = list.places[i];
        ahead.step();
        add(a + group * kGroupBytes, tile.b + group * tile.group_stride);
      }
    };
    for_each(part.quads, [&](const uint8_t* at, const int8_t* b) DYNQUANT_INLINE_LAMBDA {
      acc.template add_two_groups<Pair>(at, stride, tile, b);
    });
    for_each(part.pairs, [&](const uint8_t* at, const int8_t* b) DYNQUANT_INLINE_LAMBDA {
      acc.add_group(Products<Pair>(), at, stride, tile, b);
    });
    for_each(part.rest, [&](const uint8_t* at, const int8_t* b)
                            DYNQUANT_INLINE_LAMBDA { acc.add_group(rest, at, stride, tile, b); });
  }

  template <int kRows>
  static void make_plan_of(uint8_t* a, int64_t stride, int64_t k, Plan& plan) {
    static_assert(kRows <= kMaxRows);
    const int64_t groups = (k + 3) / 4;
    plan.groups_of_part = static_cast<int32_t>(groups_of_part(groups));
    if (prefers_signed<kRows>(a, stride, groups)) {
      plan.offset = 0;
      V::I sums[kRows];
      for (V::I& sum : sums) sum = _mm256_setzero_si256();
      list_groups<true, kRows>(a, stride, groups, plan, sums);
      for (int i = 0; i < kRows; ++i) plan.start[i] = signed_start(a + i * stride, groups, plan, sums[i]);
    } else {
      plan.offset = 128;
      list_groups<false, kRows>(a, stride, groups, plan, nullptr);
      for (int i = 0; i < kRows; ++i) {
        plan.start[i] = 0;
        make_unsigned(a + i * stride, groups);
      }
    }
  }

  // By every fourth 8 groups: whichever it is, the bits are the same.
  template <int kRows>
  static bool prefers_signed(const uint8_t* a, int64_t stride, int64_t groups) {
    int gain = 0;
    V::I sums[kRows];
    for (V::I& sum : sums) sum = _mm256_setzero_si256();
    for (int64_t g = 0; g < groups; g += 32) {
      gain += fits<true, kRows>(a + g * kGroupBytes, stride, groups - g, sums).gain();
      gain -= fits<false, kRows>(a + g * kGroupBytes, stride, groups - g, sums).gain();
    }
    return gain >= 0;
  }

  // Of 8 groups, a bit each: those whose pairs fit 16 bits, and those that do together with their neighbour.
  struct Fits {
    int pairs, quads;

    int gain() const {
      return 2 * __builtin_popcount(static_cast<unsigned>(pairs)) +
             __builtin_popcount(static_cast<unsigned>(quads));
    }
  };

  // Bits of the first `groups` of 8.
  static int present(int64_t groups) { return groups < 8 ? (1 << groups) - 1 : 255; }

  static V::I swap_groups(V::I words) { return _mm256_shuffle_epi32(words, 0xB1); }

  // Bits of the lanes whose two words are both within the bound.
  static int within(V::I words, int16_t bound) {
    const V::I beyond = _mm256_cmpgt_epi16(words, _mm256_set1_epi16(bound));
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(beyond, _mm256_setzero_si256())));
  }

  // Of the 8 groups at `a`, of which `groups` are there. Adds up each signed row by 32-bit lanes.
  template <bool kSigned, int kRows>
  DYNQUANT_INLINE static Fits fits(const uint8_t* a, int64_t stride, int64_t groups, V::I* row_sums) {
    const V::I ones = _mm256_set1_epi8(1), none = _mm256_set1_epi16(-32768);
    // Largest over the rows, of words that are sums of two neighbours or of four: two and those of the next group.
    V::I two = none, four = none;
    DYNQUANT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const V::I q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * stride));
      const V::I sums = _mm256_maddubs_epi16(ones, q),
                 sums_of_four = _mm256_add_epi16(sums, swap_groups(sums));
      if constexpr (kSigned) {
        row_sums[i] = _mm256_add_epi32(row_sums[i], _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
        const V::I positive = _mm256_maddubs_epi16(_mm256_max_epi8(q, _mm256_setzero_si256()), ones);
        const V::I positive_of_four = _mm256_add_epi16(positive, swap_groups(positive));
        const V::I negative_of_four = _mm256_sub_epi16(positive_of_four, sums_of_four);
        two = _mm256_max_epi16(two, _mm256_abs_epi16(sums));
        four = _mm256_max_epi16(four, _mm256_max_epi16(positive_of_four, negative_of_four));
      } else {
        two = _mm256_max_epi16(two, sums);
        four = _mm256_max_epi16(four, sums_of_four);
      }
    }
    // The sum of q + 128 over two is theirs + 256, over four theirs + 512.
    const int all = present(groups), in_twos = all & (all >> 1) & 0x55, together = in_twos | in_twos << 1;
    return Fits{within(two, kSigned ? 128 : 0) & all, within(four, kSigned ? 128 : -256) & together};
  }

  template <bool kSigned, int kRows>
  static void list_groups(const uint8_t* a, int64_t stride, int64_t groups, Plan& plan, V::I* row_sums) {
    for (int64_t begin = 0; begin < groups; begin += plan.groups_of_part) {
      Part& part = part_of(plan, begin);
      part.quads.clear();
      part.pairs.clear();
      part.rest.clear();
      const int64_t end = least(groups, begin + plan.groups_of_part);
      for (int64_t g = begin; g < end; g += 8) {
        const Fits found = fits<kSigned, kRows>(a + g * kGroupBytes, stride, end - g, row_sums);
        const int alone = present(end - g) & ~found.quads;
        part.quads.append(g - begin, found.quads & 0x55);
        part.pairs.append(g - begin, alone & found.pairs);
        part.rest.append(g - begin, alone & ~found.pairs);
      }
    }
  }

  // w + 128 adds 128 for each activation of the quads and pairs. `sums` are of all that the row has room for.
  static int32_t signed_start(const uint8_t* row, int64_t groups, const Plan& plan, V::I sums) {
    __m128i others = _mm_setzero_si128();  // the rest, and what lies behind the last group
    const auto leave_out = [&](int64_t g) {
      int32_t q;
      __builtin_memcpy(&q, row + g * kGroupBytes, sizeof(q));
      others = _mm_add_epi32(
          others, _mm256_castsi256_si128(sums_of_groups(_mm256_castsi128_si256(_mm_cvtsi32_si128(q)))));
    };
    for (int64_t begin = 0; begin < groups; begin += plan.groups_of_part) {
      const auto& rest = part_of(plan, begin).rest;
      for (int64_t j = 0; j < rest.count; ++j) leave_out(begin + rest.places[j]);
    }
    for (int64_t g = groups; g < round_up(groups, 8); ++g) leave_out(g);
    int32_t lanes[W], sum = -_mm_cvtsi128_si32(others);
    V::store(lanes, sums);
    for (const int32_t lane : lanes) sum += lane;
    return -128 * sum;
  }

  static V::I sums_of_groups(V::I q) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
  }

  static void make_unsigned(uint8_t* row, int64_t groups) {
    for (int64_t g = 0; g < groups; g += 8) {
      __m256i* at = reinterpret_cast<__m256i*>(row + g * 4);
      _mm256_storeu_si256(at, _mm256_xor_si256(_mm256_loadu_si256(at), _mm256_set1_epi8(-128)));
    }
  }
};
