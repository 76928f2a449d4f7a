// The dot product of AVX2, exact for all 8 bits. Included inside the instruction set's namespace and target
// region, after vector_256.h.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds two neighbouring products in 16 bits, where they
// may saturate. The activations alone tell whether they can, for any weights in [-127, 127] (-128 takes
// avx2_words.h):
//
//   activations          vpmaddubsw of    exact if, of the activations of one sum,
//   signed:   q          (w + 128, q)     the positive ones total <= 128, the negative ones >= -128
//   unsigned: q + 128    (q + 128, w)     all total <= 256
//
// since 255 * 128 = 32640 and 256 * 127 = 32512 are below 2^15.
//
// Signed suits values around zero, unsigned values that an activation function has cut off below. The sums
// are checked once for the rows of a tile and hold for all output channels. Each group of 4 along K then
// takes the cheapest product that is exact for it; the integers are the same for each:
//
//   quads   two groups, their words added before they are widened        5 instructions for 2 x 32 products
//   pairs   vpmaddubsw, vpmaddwd by ones, vpaddd                         3 for 32
//   rest    signed: |q| times w with q's sign; two products always fit   4 for 32
//           unsigned: even and odd bytes apart, widened to 16 bits       4 for 32, and the widening

// The positions of the set bits of a byte, in order.
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
  // 2 x 4: 8 accumulators + 4 w + 1 a + 1 product + 2 constants of 16 registers. More rows would leave fewer
  // groups for the cheap products. With one row, reading the weight is the limit.
  static constexpr int kMaxRows = 2;
  template <int kRows>
  static constexpr int kVectors = kRows == 1 ? 8 : 4;

  static constexpr int kGroupBytes = 4;  // of a packed row, for 4 elements
  static constexpr int32_t kOffset = 0;  // packed value = q + kOffset
  using ZeroPointCompensation = CompensationByProduct;

  static void store_activations(uint8_t* p, V::I q0, V::I q1, V::I q2, V::I q3) {
    V::store_bytes(reinterpret_cast<int8_t*>(p), q0, q1, q2, q3);
  }

  // ---- products of a group ----

  // From w to w + 128 as unsigned bytes, and back.
  static V::I toggle_bias(V::I w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }

  template <bool kSigned>
  struct Pairs {
    static constexpr int kActivationsAt = 0;

    static V::I weight(V::I w) { return kSigned ? toggle_bias(w) : w; }
    static V::I weight_of_biased(V::I w) { return kSigned ? w : toggle_bias(w); }

    static V::I multiply_add(V::I acc, V::I a, V::I w) { return add_words(acc, words(a, w)); }

    // Of two adjacent groups.
    static void multiply_add_two(V::I& acc, const V::I (&a)[2], V::I w0, V::I w1) {
      acc = add_words(acc, _mm256_add_epi16(words(a[0], w0), words(a[1], w1)));
    }

    // For two rows, as one piece of assembly: GCC 12 would spill accumulators to overlap more products.
    static void multiply_add_two(V::I& acc0, V::I& acc1, const V::I (&a0)[2], const V::I (&a1)[2], V::I w0,
                                 V::I w1) {
      V::I sum0 = acc0, sum1 = acc1, first, second;  // without locals GCC keeps the accumulators in memory
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

  // Exact for any signed activations: 2 * 128 * 127 = 32512.
  struct SignedProduct {
    static constexpr int kActivationsAt = 0;

    static V::I weight(V::I w) { return w; }
    static V::I weight_of_biased(V::I w) { return toggle_bias(w); }

    static V::I multiply_add(V::I acc, V::I a, V::I w) {
      return add_words(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a)));
    }
  };

  // Exact for any unsigned activations: the even or the odd bytes, as 16-bit words.
  template <bool kOdd>
  struct UnsignedProduct {
    static constexpr int kActivationsAt = 0;

    static V::I weight(V::I w) { return _mm256_srai_epi16(kOdd ? w : _mm256_slli_epi16(w, 8), 8); }
    static V::I weight_of_biased(V::I w) { return weight(toggle_bias(w)); }

    static V::I multiply_add(V::I acc, V::I a, V::I w) {
      const V::I words = kOdd ? _mm256_srli_epi16(a, 8) : _mm256_and_si256(a, _mm256_set1_epi16(0xff));
      return add_to(acc, _mm256_madd_epi16(words, w));
    }
  };

  using Exact = Products<SignedProduct>;  // without a plan

  // ---- plans: the product of each group ----

  static constexpr bool kPlans = true;

  // Blocks of K are multiples of 8 groups; their weights fit L1.
  static constexpr int64_t kGroupsOfKBlock = 192;

  // Positions of groups in a block of K. append() writes eight at a time and counts the valid ones.
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

  // Of the rows of a tile; its blocks of K follow in memory.
  struct Plan {
    int32_t offset;           // packed value = q + offset: 0 signed, 128 unsigned
    int32_t start[kMaxRows];  // initial accumulators of each row: minus the excess of w + 128
    int32_t groups_of_k_block;
  };
  struct KBlock {
    List<kGroupsOfKBlock / 2> quads;  // the first group of each pair of groups
    List<kGroupsOfKBlock> pairs, rest;
  };

  static bool takes_biased(const Plan& plan) { return plan.offset == 0; }

  static int64_t groups_of_k_block(int64_t groups) {
    const int64_t k_blocks = (groups + kGroupsOfKBlock - 1) / kGroupsOfKBlock;
    return k_blocks == 0 ? 8 : round_up((groups + k_blocks - 1) / k_blocks, 8);
  }

  static int64_t plan_bytes(int64_t k) {
    const int64_t groups = (k + 3) / 4, k_block = groups_of_k_block(groups);
    return round_up(sizeof(Plan) + (groups + k_block - 1) / k_block * sizeof(KBlock), 64);
  }

  // For `rows` packed rows, which are converted to the form that the plan chooses.
  static void make_plan(uint8_t* a, int64_t stride, int rows, int64_t k, Plan& plan) {
    rows == 1 ? make_plan_of<1>(a, stride, k, plan) : make_plan_of<2>(a, stride, k, plan);
  }

  // Adds the products of the block of K from `group` on, whose weights begin at tile.b. `ahead` prefetches
  // meanwhile.
  template <typename Accumulators, typename Tile, typename Ahead>
  DYNQUANT_INLINE static void add(const Plan& plan, int64_t group, Accumulators& acc, const uint8_t* a,
                                  int64_t stride, const Tile& tile, Ahead ahead) {
    const KBlock& k_block = k_block_of(plan, group);
    if (plan.offset == 0) {
      add_listed<Pairs<true>>(k_block, acc, a, stride, tile, ahead, Products<SignedProduct>());
    } else {
      add_listed<Pairs<false>>(k_block, acc, a, stride, tile, ahead,
                               Products<UnsignedProduct<false>, UnsignedProduct<true>>());
    }
  }

 private:
  // In place: with the intrinsic GCC 12 copies accumulators and adds products first, for which registers are
  // lacking.
  static V::I add_to(V::I acc, V::I x) {
    __asm__("vpaddd %1, %0, %0" : "+x"(acc) : "x"(x));
    return acc;
  }

  static V::I add_words(V::I acc, V::I words) {
    return add_to(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
  }

  static KBlock& k_block_of(const Plan& plan, int64_t group) {
    return const_cast<KBlock*>(reinterpret_cast<const KBlock*>(&plan + 1))[group / plan.groups_of_k_block];
  }

  template <typename Pair, typename Accumulators, typename Tile, typename Ahead, typename Rest>
  DYNQUANT_INLINE static void add_listed(const KBlock& k_block, Accumulators& acc, const uint8_t* a,
                                         int64_t stride, const Tile& tile, Ahead ahead, Rest rest) {
    ahead.over(k_block.quads.count + k_block.pairs.count + k_block.rest.count);
    const auto for_each = [&](const auto& list, auto add) DYNQUANT_INLINE_LAMBDA {
      for (int64_t i = 0; i < list.count; ++i) {
        const int64_t group = list.places[i];
        ahead.step();
        add(a + group * kGroupBytes, tile.b + group * tile.group_stride);
      }
    };
    for_each(k_block.quads, [&](const uint8_t* at, const int8_t* b) DYNQUANT_INLINE_LAMBDA {
      acc.template add_two_groups<Pair>(at, stride, tile, b);
    });
    for_each(k_block.pairs, [&](const uint8_t* at, const int8_t* b) DYNQUANT_INLINE_LAMBDA {
      acc.add_group(Products<Pair>(), at, stride, tile, b);
    });
    for_each(k_block.rest, [&](const uint8_t* at, const int8_t* b)
                               DYNQUANT_INLINE_LAMBDA { acc.add_group(rest, at, stride, tile, b); });
  }

  template <int kRows>
  static void make_plan_of(uint8_t* a, int64_t stride, int64_t k, Plan& plan) {
    static_assert(kRows <= kMaxRows);
    const int64_t groups = (k + 3) / 4;
    plan.groups_of_k_block = static_cast<int32_t>(groups_of_k_block(groups));
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

  // Samples every fourth run of 8 groups; either choice gives the same bits.
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

  // One bit for each of 8 groups: its pairs fit 16 bits; it fits together with its neighbour.
  struct Fits {
    int pairs, quads;

    int gain() const {
      return 2 * __builtin_popcount(static_cast<unsigned>(pairs)) +
             __builtin_popcount(static_cast<unsigned>(quads));
    }
  };

  // Bits of the first `groups` of 8 groups.
  static int present(int64_t groups) { return groups < 8 ? (1 << groups) - 1 : 255; }

  static V::I swap_groups(V::I words) { return _mm256_shuffle_epi32(words, 0xB1); }

  // Bits of the lanes with both words within the bound.
  static int within(V::I words, int16_t bound) {
    const V::I beyond = _mm256_cmpgt_epi16(words, _mm256_set1_epi16(bound));
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(beyond, _mm256_setzero_si256())));
  }

  // Of the 8 groups at `a`, of which `groups` exist. Also sums each signed row by 32-bit lanes.
  template <bool kSigned, int kRows>
  DYNQUANT_INLINE static Fits fits(const uint8_t* a, int64_t stride, int64_t groups, V::I* row_sums) {
    const V::I ones = _mm256_set1_epi8(1), none = _mm256_set1_epi16(-32768);
    // Maxima over the rows of sums of two neighbours, and of four: two of this group and two of the next.
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
    // A sum of two q + 128 is that of q plus 256, a sum of four plus 512.
    const int all = present(groups), in_twos = all & (all >> 1) & 0x55, together = in_twos | in_twos << 1;
    return Fits{within(two, kSigned ? 128 : 0) & all, within(four, kSigned ? 128 : -256) & together};
  }

  template <bool kSigned, int kRows>
  static void list_groups(const uint8_t* a, int64_t stride, int64_t groups, Plan& plan, V::I* row_sums) {
    for (int64_t begin = 0; begin < groups; begin += plan.groups_of_k_block) {
      KBlock& k_block = k_block_of(plan, begin);
      k_block.quads.clear();
      k_block.pairs.clear();
      k_block.rest.clear();
      const int64_t end = least(groups, begin + plan.groups_of_k_block);
      for (int64_t g = begin; g < end; g += 8) {
        const Fits found = fits<kSigned, kRows>(a + g * kGroupBytes, stride, end - g, row_sums);
        const int alone = present(end - g) & ~found.quads;
        k_block.quads.append(g - begin, found.quads & 0x55);
        k_block.pairs.append(g - begin, alone & found.pairs);
        k_block.rest.append(g - begin, alone & ~found.pairs);
      }
    }
  }

  // w + 128 adds 128 per activation of quads and pairs. `sums` cover the whole row, including its padding.
  static int32_t signed_start(const uint8_t* row, int64_t groups, const Plan& plan, V::I sums) {
    __m128i others = _mm_setzero_si128();  // the rest, and the padding behind the last group
    const auto leave_out = [&](int64_t g) {
      int32_t q;
      __builtin_memcpy(&q, row + g * kGroupBytes, sizeof(q));
      others = _mm_add_epi32(
          others, _mm256_castsi256_si128(sums_of_groups(_mm256_castsi128_si256(_mm_cvtsi32_si128(q)))));
    };
    for (int64_t begin = 0; begin < groups; begin += plan.groups_of_k_block) {
      const auto& rest = k_block_of(plan, begin).rest;
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
