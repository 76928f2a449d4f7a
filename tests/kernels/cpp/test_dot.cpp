// Each Dot's products against int64 sums in plain C++: exact for all activations in [-128, 127] and weights in
// [-127, 127], in the corners where 16-bit sums saturate too.
#include <doctest/doctest.h>

#include <algorithm>

#include "bits.h"
#include "cpu/dot/concept.h"
#include "cpu/kernel_table.h"
#include "isas.h"

namespace kernel_tests {
namespace {

using Bytes = std::vector<int8_t>;

size_t at(int64_t i) { return static_cast<size_t>(i); }

// weight[channels][k] as one panel [ceil(k / 4)][channels][4].
Bytes pack_panel(const Bytes& weight, int channels, int64_t k) {
  Bytes packed(at((k + 3) / 4 * 4 * channels));
  for (int c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < k; ++i) packed[at((i / 4 * channels + c) * 4 + i % 4)] = weight[at(c * k + i)];
  }
  return packed;
}

// Checks a tile of `rows` rows, by the products for all values and, where there is one, by plan.
void check_tile(const DotOps& dot, const Bytes& q, int rows, int64_t k, const Bytes& weight) {
  const int channels = dot.channels(rows);
  const Bytes packed = pack_panel(weight, channels, k);
  for (const bool planned : {false, true}) {
    if (planned && !dot.plans) continue;
    std::vector<int32_t> acc(at(rows * channels), 0x5a5a5a5a);
    const int64_t offset =
        (planned ? dot.multiply_planned : dot.multiply)(q.data(), rows, k, packed.data(), acc.data());
    for (int m = 0; m < rows; ++m) {
      for (int c = 0; c < channels; ++c) {
        int64_t expected = 0;
        for (int64_t i = 0; i < k; ++i) expected += (q[at(m * k + i)] + offset) * weight[at(c * k + i)];
        if (acc[at(m * channels + c)] != expected) {
          FAIL_CHECK(std::string(planned ? "planned" : "exact")
                     << ", row " << m << " of " << rows << ", channel " << c << ", K = " << k << ": "
                     << acc[at(m * channels + c)] << ", expected " << expected);
          return;
        }
      }
    }
  }
}

template <typename Check>
void for_each_dot(const Check& check) {
  for (const Isa& isa : runnable_primitives()) {
    INFO(isa.name);
    check(isa.primitives->dot, isa.primitives->vector.lanes);
  }
}

// Channels in turn take every pattern of signs over a group.
Bytes sign_patterns(int channels, int64_t k, int8_t magnitude) {
  Bytes weight(at(channels * k));
  for (int c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < k; ++i) {
      weight[at(c * k + i)] = static_cast<int8_t>((c >> i % 4 & 1) != 0 ? -magnitude : magnitude);
    }
  }
  return weight;
}

int8_t pick(std::mt19937& generator, const std::vector<int>& values) {
  return static_cast<int8_t>(values[generator() % values.size()]);
}

}  // namespace

TEST_SUITE("dot") {
  TEST_CASE("every pair of activations with extreme weights of every sign") {
    for_each_dot([](const DotOps& dot, int) {
      const int rows = dot.max_rows, channels = dot.channels(rows);
      const Bytes weight = sign_patterns(channels, 4, 127);
      Bytes q(at(rows * 4));
      int row = 0;
      for (int q0 = -128; q0 < 128; ++q0) {
        for (int q1 = -128; q1 < 128; q1 += (q0 % 16 == 0 || q1 >= 120 || q1 < -120) ? 1 : 5) {
          q[at(row * 4)] = static_cast<int8_t>(q0);
          q[at(row * 4 + 1)] = static_cast<int8_t>(q1);
          q[at(row * 4 + 2)] = static_cast<int8_t>(q1);
          q[at(row * 4 + 3)] = static_cast<int8_t>(q0);
          row = (row + 1) % rows;
          if (row == 0) check_tile(dot, q, rows, 4, weight);
        }
      }
    });
  }

  TEST_CASE("sums at the bounds of 16 bits") {
    // Of two and of four neighbours: 128 and 256 are the last that fit, in dot/avx2_pairs.h.
    const std::vector<std::vector<int>> groups = {
        {127, 1, 0, 0},           {127, 2, 0, 0},         {64, 64, 0, 0},   {64, 65, 0, 0},
        {127, 127, 127, 127},     {-128, 0, 0, 0},        {-128, -1, 0, 0}, {-64, -64, 0, 0},
        {-128, -128, -128, -128}, {127, -128, 127, -128}, {32, 32, 32, 32}, {32, 32, 32, 33},
        {-32, -32, -32, -32},     {-33, -32, -32, -32},   {0, 0, 127, 1},   {0, 0, 127, 2},
        {-128, -128, 127, 127},   {1, -128, 127, 0},      {0, 0, 0, 0}};
    for_each_dot([&](const DotOps& dot, int) {
      for (int rows = 1; rows <= dot.max_rows; ++rows) {
        const int channels = dot.channels(rows);
        for (const int8_t magnitude : {127, 1}) {
          const Bytes weight = sign_patterns(channels, 8, magnitude);
          for (const auto& first : groups) {
            for (const auto& second : groups) {
              Bytes q;
              for (int m = 0; m < rows; ++m) {  // rows differ: a plan holds for all rows of a tile
                for (const int value : m % 2 == 0 ? first : second) q.push_back(static_cast<int8_t>(value));
                for (const int value : second) q.push_back(static_cast<int8_t>(value));
              }
              check_tile(dot, q, rows, 8, weight);
            }
          }
        }
      }
    });
  }

  TEST_CASE("every number of rows, K around the groups and the blocks of a plan") {
    const std::vector<int> extremes = {-128, -127, -65, -64, -1, 0, 1, 63, 64, 126, 127};
    const std::vector<int> weights = {-127, -126, -64, -1, 0, 1, 64, 127};
    std::mt19937 generator(7);
    for_each_dot([&](const DotOps& dot, int) {
      for (int rows = 1; rows <= dot.max_rows; ++rows) {
        for (const int64_t k : {1, 2, 3, 4, 5, 31, 32, 33, 63, 65, 128, 255, 767, 772, 1541}) {
          const int channels = dot.channels(rows);
          for (const int kind : {0, 1, 2}) {  // extremes; small ones, all of them pairs; cut off below
            Bytes q(at(rows * k)), weight(at(channels * k));
            for (int8_t& value : q) {
              value = kind == 0   ? pick(generator, extremes)
                      : kind == 1 ? static_cast<int8_t>(static_cast<int>(generator() % 64) - 32)
                                  : pick(generator, {-128, -128, -128, -128, -100, 127});
            }
            for (int8_t& value : weight) value = pick(generator, weights);
            check_tile(dot, q, rows, k, weight);
          }
        }
      }
    });
  }

  TEST_CASE("all extremes at once") {
    for_each_dot([](const DotOps& dot, int) {
      for (int rows = 1; rows <= dot.max_rows; ++rows) {
        for (const int8_t activation : {-128, 127}) {
          for (const int8_t value : {-127, 127}) {
            const int64_t k = 1500;
            check_tile(dot, Bytes(at(rows * k), activation), rows, k,
                       Bytes(at(dot.channels(rows) * k), value));
          }
        }
      }
    });
  }

  TEST_CASE("the zero point is subtracted exactly, for the largest sums and accumulators") {
    for_each_dot([](const DotOps& dot, int lanes) {
      const int64_t most = dot.max_k * 127;
      std::mt19937 generator(8);
      std::vector<int32_t> sums = {0, 1, -1, 127, 128, -127, -128, -129, 32767, 32768};
      for (const int64_t sum : {most, most - 1, most / 2}) {
        sums.push_back(static_cast<int32_t>(sum));
        sums.push_back(static_cast<int32_t>(-sum));
      }
      while (sums.size() < kMostLanes * 4) {
        sums.push_back(static_cast<int32_t>(static_cast<int64_t>(generator()) % (2 * most + 1) - most));
      }
      for (int zero_point = -128; zero_point < 128; ++zero_point) {
        const int32_t offset = zero_point + dot.offset;
        for (size_t i = 0; i < sums.size(); i += kMostLanes) {
          for (const int32_t start : {0, 12345, -0x7fffffff - 1, 0x7fffffff}) {  // wraps, as the sum fits
            int32_t acc[kMostLanes], out[kMostLanes];
            std::fill_n(acc, kMostLanes, start);
            dot.subtract(acc, offset, &sums[i], out);
            for (int lane = 0; lane < lanes; ++lane) {
              const uint32_t taken =
                  static_cast<uint32_t>(offset) * static_cast<uint32_t>(sums[i + at(lane)]);
              if (out[lane] != static_cast<int32_t>(static_cast<uint32_t>(start) - taken)) {
                FAIL_CHECK("sum " << sums[i + at(lane)] << ", offset " << offset << ": " << out[lane]);
              }
            }
          }
        }
      }
    });
  }
}

// ---- the concept refuses a Dot that lacks something ----

#if defined(DYNQUANT_HAS_CONCEPTS)
namespace {

namespace scalar {
using dynquant::BFloat16;
using dynquant::Float16;
using dynquant::cpu::kMaxInt32K;
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_128.h"
#include "cpu/generic/prelude.h"

struct Step {
  static constexpr int kActivationsAt = 0;
  static I weight(I);
  static I multiply_add(I, I, I);
};
struct Dot {
  static constexpr int kMaxRows = 1;
  template <int kRows>
  static constexpr int kVectors = 1;
  static constexpr int kGroupBytes = 4;
  static constexpr int32_t kOffset = 0;
  using ZeroPointCompensation = CompensationByProduct;
  static constexpr bool kPlans = false;
  static constexpr int64_t kGroupsOfKBlock = 0;
  using Exact = Products<Step>;
  static void store_activations(uint8_t*, I, I, I, I);
};
struct WithoutSteps : Dot {
  using Exact = Products<>;
};
struct WithoutPlans : Dot {
  static constexpr bool kPlans = true;
};
struct WithoutStore : Dot {
  static void store_activations() = delete;
};
}  // namespace scalar

static_assert(dynquant::cpu::DotProduct<scalar::Dot, scalar::V>);
static_assert(!dynquant::cpu::DotProduct<scalar::WithoutSteps, scalar::V>);
static_assert(!dynquant::cpu::DotProduct<scalar::WithoutPlans, scalar::V>);
static_assert(!dynquant::cpu::DotProduct<scalar::WithoutStore, scalar::V>);

}  // namespace
#endif

}  // namespace kernel_tests
