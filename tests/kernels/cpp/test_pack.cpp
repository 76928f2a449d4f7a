// The packed weight against its formula, for every rest of N and K.
#include "cpu/pack.h"

#include <doctest/doctest.h>

#include "buffers.h"
#include "reference.h"
#include "threads.h"

namespace kernel_tests {

TEST_SUITE("pack") {
  TEST_CASE("pack and unpack") {
    std::mt19937 generator(31);
    for (const int64_t n : {1, 15, 16, 17, 31, 33, 48, 49, 64, 65, 100, 128, 1000}) {
      for (const int64_t k : {1, 3, 4, 5, 63, 64, 66, 1000}) {
        const int64_t panel = dynquant::cpu::panel_width(n);
        CHECK((panel == 16 || panel == 32 || panel == 64));
        CHECK((n + panel - 1) / panel * panel - n < 16);
        Bytes weight(index(n * k));
        for (int8_t& value : weight) value = static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
        const auto guarded = Guarded<int8_t>::copy_of(weight);
        const Bytes expected = pack(weight, n, k, panel);
        const std::vector<int32_t> sums = row_sums(weight, n, k);
        const auto shape = dynquant::cpu::packed_shape(n, k);
        REQUIRE(shape[0] * shape[1] * shape[2] * shape[3] == static_cast<int64_t>(expected.size()));
        for (const auto& threads : all_threads()) {
          if (n * k < 100000 && threads != all_threads().front()) continue;
          INFO(threads->name() << ", N = " << n << ", K = " << k);
          Guarded<int8_t> packed(static_cast<int64_t>(expected.size())), back(n * k);
          Guarded<int32_t> sum(n);
          dynquant::cpu::pack_weight(guarded.data(), n, k, packed.data(), sum.data(), *threads);
          dynquant::cpu::unpack_weight(packed.data(), n, k, back.data(), *threads);
          CHECK(packed.intact());
          CHECK(sum.intact());
          CHECK(back.intact());
          CHECK(std::equal(expected.begin(), expected.end(), packed.data()));
          CHECK(std::equal(sums.begin(), sums.end(), sum.data()));
          CHECK(std::equal(weight.begin(), weight.end(), back.data()));
        }
      }
    }
  }

  TEST_CASE("the first -128 is found") {
    Bytes weight(1000, 5);
    CHECK(dynquant::cpu::find_minus_128(weight.data(), 1000) == -1);
    CHECK(dynquant::cpu::find_minus_128(weight.data(), 0) == -1);
    weight[999] = -128;
    CHECK(dynquant::cpu::find_minus_128(weight.data(), 1000) == 999);
    weight[37] = -128;
    CHECK(dynquant::cpu::find_minus_128(weight.data(), 1000) == 37);
  }
}

}  // namespace kernel_tests
