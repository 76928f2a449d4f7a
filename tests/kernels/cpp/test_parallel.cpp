// Thread scopes: each thread that runs kernels is within the scope of their table, and as before after it.
#include <doctest/doctest.h>

#include <atomic>
#include <cfenv>
#include <mutex>
#include <set>

#include "buffers.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/thread_scope.h"
#include "cpu/quantize.h"
#include "isas.h"
#include "reference.h"
#include "threads.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace kernel_tests {
namespace {

using dynquant::cpu::InThreadScope;
using dynquant::cpu::kFloatModes;
using dynquant::cpu::ThreadScope;

// A scope like one that configures registers: it counts, and hands its thread's state through.
std::atomic<int> entered, left;
thread_local uint64_t depth = 0;

const ThreadScope kCounting = {[] {
                                 ++entered;
                                 return depth++;
                               },
                               [](uint64_t saved) {
                                 ++left;
                                 depth = saved;
                               }};

// Whether fp32 arithmetic rounds up. (std::fegetround tells of the x87 unit.)
bool rounds_up() {
  volatile float one = 1.0f, little = 0x1p-30f;
  volatile float sum = one + little;
  return sum > 1.0f;
}

}  // namespace

TEST_SUITE("parallel") {
  TEST_CASE("every task runs once, within the scope on its thread") {
    for (const auto& threads : all_threads()) {
      for (const int64_t tasks : {0, 1, 2, 3, 4, 9}) {
        INFO(threads->name() << ", tasks: " << tasks);
        entered = left = 0;
        std::mutex mutex;
        std::multiset<int64_t> ran;
        std::atomic<int> outside{0};
        threads->run(kCounting, tasks, [&](int64_t t) {
          if (depth == 0) ++outside;
          const std::lock_guard<std::mutex> lock(mutex);
          ran.insert(t);
        });
        std::multiset<int64_t> expected;
        for (int64_t t = 0; t < tasks; ++t) expected.insert(t);
        CHECK(ran == expected);
        CHECK(outside == 0);
        CHECK(entered == left);
        CHECK(depth == 0);
        CHECK((tasks == 0 || entered > 0));
      }
    }
  }

  TEST_CASE("scopes nest") {
    entered = left = 0;
    {
      const InThreadScope outer(kCounting);
      CHECK(depth == 1);
      {
        const InThreadScope inner(kCounting);
        CHECK(depth == 2);
      }
      CHECK(depth == 1);
    }
    CHECK(depth == 0);
  }

  TEST_CASE("every table has a scope that rounds to nearest") {
    for (const std::string& isa : runnable_kernels()) {
      dynquant::cpu::set_isa(isa);
      const dynquant::cpu::KernelTable& table = dynquant::cpu::kernels();
      REQUIRE(table.scope != nullptr);
      if (table.few_rows != nullptr) CHECK(table.few_rows->scope != nullptr);
      std::fesetround(FE_UPWARD);
      const bool before = rounds_up();
      bool inside;
      {
        const InThreadScope scope(*table.scope);
        inside = rounds_up();
      }
      const bool after = rounds_up();
      std::fesetround(FE_TONEAREST);
      CHECK(before);
      CHECK(!inside);
      CHECK(after);
    }
    dynquant::cpu::set_isa(runnable_kernels().back());
  }

#if defined(__x86_64__)
  TEST_CASE("denormals count, and the modes of the caller and of each worker stay") {
    constexpr unsigned kFlushes = 0x8040, kUpward = 0x4000, kFlags = 0x3f;
    const unsigned before = _mm_getcsr();
    const float tiny[] = {0x1p-130f, -0x1p-131f, 0x1p-149f};
    const dynquant::Rows rows{tiny, Dtype::kFloat32, 1, 3, 3, {}};
    for (const std::string& isa : runnable_kernels()) {
      INFO(isa);
      dynquant::cpu::set_isa(isa);
      _mm_setcsr(before | kFlushes | kUpward);
      float lo = 0.0f, hi = 0.0f;
      min_max_rows(rows, &lo, &hi, StdThreads(1));
      const unsigned after = _mm_getcsr();
      _mm_setcsr(before);
      CHECK(lo == -0x1p-131f);
      CHECK(hi == 0x1p-130f);
      CHECK((after & ~kFlags) == ((before | kFlushes | kUpward) & ~kFlags));
    }
    // Workers whose modes differ from the caller's.
    std::atomic<int> wrong_inside{0}, wrong_after{0};
    const StdThreads four(4);
    four.run(kCounting, 4, [&](int64_t) {
      const unsigned of_worker = _mm_getcsr();
      _mm_setcsr(of_worker | kFlushes);
      {
        const InThreadScope scope(kFloatModes);
        if ((_mm_getcsr() & (kFlushes | kUpward)) != 0) ++wrong_inside;
      }
      if ((_mm_getcsr() & kFlushes) != kFlushes) ++wrong_after;
      _mm_setcsr(of_worker);
    });
    CHECK(wrong_inside == 0);
    CHECK(wrong_after == 0);
  }
#endif
}

}  // namespace kernel_tests
