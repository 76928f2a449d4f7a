// Each primitive of each V against plain scalar C++, over edge values and random bits.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "bits.h"
#include "buffers.h"
#include "cpu/simd/concept.h"
#include "isas.h"

namespace kernel_tests {
namespace {

using Floats = std::vector<float>;

// Calls check(first of `lanes` values) for windows that cover all of `values`; the last one repeats some.
template <typename T, typename Check>
void for_windows(const std::vector<T>& values, int lanes, const Check& check) {
  for (size_t i = 0; i < values.size(); i += static_cast<size_t>(lanes)) {
    check(&values[std::min(i, values.size() - static_cast<size_t>(lanes))]);
  }
}

// All pairs of values: each lane sees each pair.
template <typename T, typename Check>
void for_pairs(const std::vector<T>& values, int lanes, const Check& check) {
  std::vector<T> b(static_cast<size_t>(lanes));
  for (size_t shift = 0; shift < values.size(); ++shift) {
    std::vector<T> turned(values);
    std::rotate(turned.begin(), turned.begin() + static_cast<std::ptrdiff_t>(shift), turned.end());
    for (size_t i = 0; i + static_cast<size_t>(lanes) <= values.size(); i += static_cast<size_t>(lanes)) {
      check(&values[i], &turned[i]);
    }
  }
}

template <typename Check>
void for_each_vector(const Check& check) {
  for (const Isa& isa : runnable_primitives()) {
    INFO(isa.name);
    check(isa.primitives->vector);
  }
}

void check_binary(const VectorOps& v, VectorOps::Binary op,
                  const std::function<float(float, float)>& expected) {
  // Multiples of 16 lanes, so that no pair is left out.
  Floats values = test_floats(100, 1);
  while (values.size() % kMostLanes != 0) values.push_back(1.0f);
  for_pairs(values, v.lanes, [&](const float* a, const float* b) {
    float out[kMostLanes];
    op(a, b, out);
    for (int i = 0; i < v.lanes; ++i) {
      const float wanted = expected(a[i], b[i]);
      if (!same_bits(out[i], wanted))
        FAIL_CHECK("lane " << i << ": op(" << a[i] << ", " << b[i] << ") = " << out[i] << ", expected "
                           << wanted);
    }
  });
}

void check_int_binary(const VectorOps& v, VectorOps::IntBinary op,
                      const std::function<int32_t(int32_t, int32_t)>& expected) {
  std::vector<int32_t> values = edge_ints();
  while (values.size() % kMostLanes != 0) values.push_back(77);
  for_pairs(values, v.lanes, [&](const int32_t* a, const int32_t* b) {
    int32_t out[kMostLanes];
    op(a, b, out);
    for (int i = 0; i < v.lanes; ++i) {
      if (out[i] != expected(a[i], b[i]))
        FAIL_CHECK("lane " << i << ": op(" << a[i] << ", " << b[i] << ") = " << out[i]);
    }
  });
}

int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }

// Keeps the compiler from folding or contracting the expected value.
float rounded(float x) {
  volatile float out = x;
  return out;
}

}  // namespace

TEST_SUITE("vector") {
  TEST_CASE("float arithmetic rounds once") {
    for_each_vector([](const VectorOps& v) {
      check_binary(v, v.add, [](float a, float b) { return rounded(a + b); });
      check_binary(v, v.sub, [](float a, float b) { return rounded(a - b); });
      check_binary(v, v.mul, [](float a, float b) { return rounded(a * b); });
      check_binary(v, v.div, [](float a, float b) { return rounded(a / b); });
    });
  }

  TEST_CASE("min and max return their second operand where one is NaN, or both are zeros") {
    for_each_vector([](const VectorOps& v) {
      check_binary(v, v.min, [](float a, float b) { return a < b ? a : b; });
      check_binary(v, v.max, [](float a, float b) { return a > b ? a : b; });
    });
  }

  TEST_CASE("fma rounds once") {
    for_each_vector([](const VectorOps& v) {
      const Floats values = edge_floats(), others = test_floats(200, 2);
      for (const float c : values) {
        for_windows(others, v.lanes, [&](const float* a) {
          float b[kMostLanes], cs[kMostLanes], out[kMostLanes];
          for (int i = 0; i < v.lanes; ++i)
            b[i] = others[static_cast<size_t>(i * 7 + 3) % others.size()], cs[i] = c;
          v.fma(a, b, cs, out);
          for (int i = 0; i < v.lanes; ++i) {
            const float wanted = std::fma(a[i], b[i], c);
            if (!same_bits(out[i], wanted))
              FAIL_CHECK("fma(" << a[i] << ", " << b[i] << ", " << c << ") = " << out[i]);
          }
        });
      }
      // Products whose low bits decide: (1 + e)(1 - e) - 1 = -e e.
      float a[kMostLanes], b[kMostLanes], c[kMostLanes], out[kMostLanes];
      std::fill_n(a, kMostLanes, 1.0f + 0x1p-12f);
      std::fill_n(b, kMostLanes, 1.0f - 0x1p-12f);
      std::fill_n(c, kMostLanes, -1.0f);
      v.fma(a, b, c, out);
      for (int i = 0; i < v.lanes; ++i) CHECK(out[i] == -0x1p-24f);
    });
  }

  TEST_CASE("int32 arithmetic wraps") {
    for_each_vector([](const VectorOps& v) {
      check_int_binary(v, v.int_add, [](int32_t a, int32_t b) { return wrap(uint32_t(a) + uint32_t(b)); });
      check_int_binary(v, v.int_sub, [](int32_t a, int32_t b) { return wrap(uint32_t(a) - uint32_t(b)); });
      check_int_binary(v, v.int_mul, [](int32_t a, int32_t b) { return wrap(uint32_t(a) * uint32_t(b)); });
      check_int_binary(v, v.int_max, [](int32_t a, int32_t b) { return std::max(a, b); });
      check_int_binary(v, v.bit_and, [](int32_t a, int32_t b) { return a & b; });
      check_int_binary(v, v.bit_or, [](int32_t a, int32_t b) { return a | b; });
      check_int_binary(v, v.bit_xor, [](int32_t a, int32_t b) { return a ^ b; });
    });
  }

  TEST_CASE("shifts by every count") {
    for_each_vector([](const VectorOps& v) {
      for (int count = 0; count < 32; ++count) {
        for_windows(edge_ints(), v.lanes, [&](const int32_t* a) {
          int32_t left[kMostLanes], right[kMostLanes];
          v.shift_left[count](a, left);
          v.shift_right[count](a, right);
          for (int i = 0; i < v.lanes; ++i) {
            CHECK(left[i] == wrap(uint32_t(a[i]) << count));
            CHECK(right[i] == wrap(uint32_t(a[i]) >> count));
          }
        });
      }
    });
  }

  TEST_CASE("loads of all 16-bit patterns") {
    for_each_vector([](const VectorOps& v) {
      for (uint32_t first = 0; first < 65536; first += static_cast<uint32_t>(v.lanes)) {
        uint16_t patterns[kMostLanes];
        float brain[kMostLanes], half[kMostLanes];
        for (int i = 0; i < v.lanes; ++i)
          patterns[i] = static_cast<uint16_t>(first + static_cast<uint32_t>(i));
        v.load_bfloat16(patterns, brain);
        v.load_float16(patterns, half);
        for (int i = 0; i < v.lanes; ++i) {
          if (!same_bits(brain[i], float_of_bfloat16(patterns[i]))) FAIL_CHECK("bf16 " << patterns[i]);
          if (!same_bits(half[i], float_of_float16(patterns[i]))) FAIL_CHECK("fp16 " << patterns[i]);
        }
      }
    });
  }

  TEST_CASE("stores round to the nearest 16-bit number, ties to even") {
    // Edge values, every half way between neighbours near the ends of fp16, random bits.
    Floats values = test_floats(20000, 3);
    for (uint32_t bits = 0; bits < 0x7c00; bits += 13) {
      const float low = float_of_float16(uint16_t(bits)), high = float_of_float16(uint16_t(bits + 1));
      if (std::isinf(high)) continue;
      for (const float x :
           {low, (low + high) / 2, std::nextafter((low + high) / 2, 0.0f), -(low + high) / 2}) {
        values.push_back(x);
      }
    }
    for_each_vector([&](const VectorOps& v) {
      for_windows(values, v.lanes, [&](const float* x) {
        uint16_t brain[kMostLanes], half[kMostLanes];
        v.store_bfloat16(brain, x);
        v.store_float16(half, x);
        for (int i = 0; i < v.lanes; ++i) {
          const bool nan = std::isnan(x[i]);
          if (nan ? !std::isnan(float_of_bfloat16(brain[i])) : brain[i] != bfloat16_of(x[i]))
            FAIL_CHECK("bf16 of " << x[i] << " = " << brain[i]);
          if (nan ? !std::isnan(float_of_float16(half[i])) : half[i] != float16_of(x[i]))
            FAIL_CHECK("fp16 of " << x[i] << " = " << half[i]);
        }
      });
    });
  }

  TEST_CASE("broadcast, casts of bits, conversions") {
    for_each_vector([](const VectorOps& v) {
      for (const float x : edge_floats()) {
        float out[kMostLanes];
        v.broadcast(x, out);
        for (int i = 0; i < v.lanes; ++i) CHECK(bit_cast<uint32_t>(out[i]) == bit_cast<uint32_t>(x));
      }
      for_windows(edge_floats(), v.lanes, [&](const float* x) {
        int32_t bits[kMostLanes];
        float back[kMostLanes], kept[kMostLanes];
        v.as_int(x, bits);
        v.as_float(bits, back);
        v.in_register(x, kept);
        for (int i = 0; i < v.lanes; ++i) {
          CHECK(bits[i] == bit_cast<int32_t>(x[i]));
          CHECK(bit_cast<int32_t>(back[i]) == bits[i]);
          CHECK(bit_cast<int32_t>(kept[i]) == bits[i]);
        }
      });
      for_windows(edge_ints(), v.lanes, [&](const int32_t* x) {
        float out[kMostLanes];
        int32_t same[kMostLanes];
        v.convert(x, out);
        for (int i = 0; i < v.lanes; ++i) CHECK(out[i] == static_cast<float>(x[i]));
        v.int_broadcast(x[0], same);
        for (int i = 0; i < v.lanes; ++i) CHECK(same[i] == x[0]);
      });
    });
  }

  TEST_CASE("round takes halves to even") {
    Floats values;
    for (const float x : test_floats(5000, 4)) {
      if (std::fabs(x) < 0x1p31f) values.push_back(x);
    }
    for (int i = -300; i < 300; ++i) values.push_back(static_cast<float>(i) / 2.0f);
    for_each_vector([&](const VectorOps& v) {
      for_windows(values, v.lanes, [&](const float* x) {
        int32_t out[kMostLanes];
        v.round(x, out);
        for (int i = 0; i < v.lanes; ++i) {
          if (out[i] != static_cast<int32_t>(std::nearbyint(x[i])))
            FAIL_CHECK("round(" << x[i] << ") = " << out[i]);
        }
      });
    });
  }

  TEST_CASE("comparisons, masks and select") {
    Floats values = edge_floats();
    while (values.size() % kMostLanes != 0) values.push_back(1.0f);
    for_each_vector([&](const VectorOps& v) {
      for_pairs(values, v.lanes, [&](const float* a, const float* b) {
        bool less[kMostLanes], unordered[kMostLanes];
        v.less(a, b, less);
        v.unordered(a, b, unordered);
        float yes[kMostLanes], no[kMostLanes], out[kMostLanes];
        for (int i = 0; i < v.lanes; ++i) yes[i] = static_cast<float>(i), no[i] = NAN;
        const bool any = v.select(a, b, b, a, yes, no, out);
        bool expected_any = false;
        for (int i = 0; i < v.lanes; ++i) {
          const bool is_unordered = std::isnan(a[i]) || std::isnan(b[i]);
          CHECK(less[i] == (a[i] < b[i]));
          CHECK(unordered[i] == is_unordered);
          const bool either = a[i] < b[i] || is_unordered;
          expected_any = expected_any || either;
          CHECK(same_bits(out[i], either ? yes[i] : no[i]));
        }
        CHECK(any == expected_any);
      });
      // any() sees each lane alone, and none.
      for (int lane = -1; lane < v.lanes; ++lane) {
        float a[kMostLanes], b[kMostLanes], out[kMostLanes];
        for (int i = 0; i < v.lanes; ++i) a[i] = 1.0f, b[i] = i == lane ? 2.0f : 1.0f;
        CHECK(v.select(a, b, a, a, a, b, out) == (lane >= 0));
      }
    });
  }

  TEST_CASE("lowest and highest lane, wherever it is") {
    for_each_vector([](const VectorOps& v) {
      for (int lane = 0; lane < v.lanes; ++lane) {
        for (const float extreme : {0x1p-149f, 5.0f, 0x1.fffffep127f, INFINITY}) {
          float x[kMostLanes], low[kMostLanes];
          for (int i = 0; i < v.lanes; ++i) {
            x[i] = i == lane ? extreme : 0.0f;
            low[i] = -x[i];
          }
          CHECK(v.highest_lane(x) == extreme);
          CHECK(v.lowest_lane(low) == -extreme);
        }
      }
    });
  }

  TEST_CASE("the sum of all lanes wraps, and every lane has one share in it") {
    for_each_vector([](const VectorOps& v) {
      for_windows(edge_ints(), v.lanes, [&](const int32_t* x) {
        uint32_t sum = 0;
        for (int i = 0; i < v.lanes; ++i) sum += static_cast<uint32_t>(x[i]);
        CHECK(v.sum_lanes(x) == wrap(sum));
      });
      for (int lane = 0; lane < v.lanes; ++lane) {
        int32_t x[kMostLanes] = {};
        x[lane] = INT32_MIN + lane;
        CHECK(v.sum_lanes(x) == INT32_MIN + lane);
      }
    });
  }

  TEST_CASE("transpose moves the bits of each element of a square to its mirror image") {
    constexpr size_t kMostElements = size_t(kMostLanes) * kMostLanes;
    // Each element another one; then NaN with their payloads, subnormals and signed zeros.
    std::vector<uint32_t> bits(kMostElements);
    for (size_t i = 0; i < kMostElements; ++i) bits[i] = bit_cast<uint32_t>(static_cast<float>(i));
    for (const float x : test_floats(2000, 6)) bits.push_back(bit_cast<uint32_t>(x));
    bits.push_back(0x7f812345u);  // signaling
    for_each_vector([&](const VectorOps& v) {
      const int n = v.lanes;
      for_windows(bits, n * n, [&](const uint32_t* window) {
        float rows[kMostElements], columns[kMostElements];
        std::memcpy(rows, window, sizeof(float) * static_cast<size_t>(n * n));
        v.transpose(rows, columns);
        for (int i = 0; i < n; ++i) {
          for (int j = 0; j < n; ++j) {
            if (bit_cast<uint32_t>(columns[j * n + i]) != window[i * n + j])
              FAIL_CHECK("row " << i << ", lane " << j << ": " << columns[j * n + i]);
          }
        }
      });
    });
  }

  TEST_CASE("up to a count of elements are read and written, none behind them") {
    for_each_vector([](const VectorOps& v) {
      for (int64_t count = -3; count <= v.lanes + 3; ++count) {
        INFO("count " << count);
        // The first vector of a longer row, the last of one, or none of it.
        const int64_t elements = std::max(int64_t{0}, count);
        Guarded<float> row(elements), written(elements);
        Guarded<uint16_t> half_row(elements), half_written(elements);
        for (int64_t i = 0; i < elements; ++i) {
          row[i] = static_cast<float>(i + 1);
          half_row[i] = float16_of(row[i]);
        }
        float out[kMostLanes], half_out[kMostLanes], lanes[kMostLanes];
        v.load_up_to(row.data(), count, out);
        v.load_half_up_to(half_row.data(), count, half_out);
        for (int i = 0; i < v.lanes; ++i) {
          const float wanted = i < count ? static_cast<float>(i + 1) : 0.0f;
          CHECK(same_bits(out[i], wanted));
          CHECK(same_bits(half_out[i], wanted));
          lanes[i] = static_cast<float>(i + 1);
        }
        v.store_up_to(written.data(), lanes, count);
        v.store_half_up_to(half_written.data(), lanes, count);
        for (int64_t i = 0; i < std::min<int64_t>(elements, v.lanes); ++i) {
          CHECK(same_bits(written[i], row[i]));
          CHECK(half_written[i] == half_row[i]);
        }
        CHECK(written.intact());
        CHECK(half_written.intact());
      }
    });
  }

  TEST_CASE("butterflies") {
    for_each_vector([](const VectorOps& v) {
      for (int index = 0; index < 4; ++index) {
        const int stride = 1 << index;
        REQUIRE((v.butterfly[index] != nullptr) == (stride < v.lanes));
        if (stride >= v.lanes) continue;
        for_windows(test_floats(2000, 5), v.lanes, [&](const float* x) {
          float out[kMostLanes];
          v.butterfly[index](x, out);
          for (int i = 0; i < v.lanes; ++i) {
            const bool second = (i & stride) != 0;
            const float other = x[i ^ stride];
            const float wanted = second ? rounded(other - x[i]) : rounded(x[i] + other);
            if (!same_bits(out[i], wanted))
              FAIL_CHECK("stride " << stride << ", lane " << i << ": " << x[i] << " and " << other << " -> "
                                   << out[i]);
          }
        });
      }
    });
  }

  TEST_CASE("bytes: every int8, and saturation") {
    for_each_vector([](const VectorOps& v) {
      std::vector<int32_t> values = edge_ints();
      for (int q = -300; q < 300; ++q) values.push_back(q);
      while (values.size() % (4 * kMostLanes) != 0) values.push_back(0);
      for_windows(values, 4 * v.lanes, [&](const int32_t* q) {
        int8_t bytes[4 * kMostLanes];
        v.store_bytes(bytes, q);
        for (int i = 0; i < 4 * v.lanes; ++i) {
          if (bytes[i] != std::clamp(q[i], -128, 127))
            FAIL_CHECK("byte " << i << " of " << q[i] << " = " << int(bytes[i]));
        }
      });
      for (int first = -128; first < 128; first += v.lanes) {
        int8_t bytes[kMostLanes];
        int32_t out[kMostLanes];
        for (int i = 0; i < v.lanes; ++i) bytes[i] = static_cast<int8_t>(first + i);
        v.load_bytes(bytes, out);
        for (int i = 0; i < v.lanes; ++i) CHECK(out[i] == first + i);
      }
    });
  }
}

// ---- the concept refuses a V that lacks something ----

#if defined(DYNQUANT_HAS_CONCEPTS)
namespace {

namespace scalar {
using dynquant::BFloat16;
using dynquant::Float16;
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_128.h"
}  // namespace scalar

struct WithoutFma : scalar::V {
  static void fma() = delete;
};
struct WithoutButterflies : scalar::V {
  template <int stride>
  static void butterfly(F) = delete;
};
struct LessAsInt : scalar::V {
  static bool less(F, F);
};

static_assert(dynquant::cpu::VectorType<scalar::V>);
static_assert(!dynquant::cpu::VectorType<WithoutFma>);
static_assert(!dynquant::cpu::VectorType<WithoutButterflies>);
static_assert(!dynquant::cpu::VectorType<LessAsInt>);
static_assert(!dynquant::cpu::VectorType<int>);

}  // namespace
#endif

}  // namespace kernel_tests
