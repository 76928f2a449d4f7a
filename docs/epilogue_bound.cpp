// The largest error of each epilogue function over all 2^32 fp32 inputs, against float64, in parts of what is
// allowed:
//
//   g++ -O3 -std=c++17 -ffp-contract=off -fno-math-errno -pthread -Icsrc/kernels docs/epilogue_bound.cpp
//   ./a.out [step between inputs, 1]
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/kernel_table.h"

namespace dynquant::cpu {
namespace {
#define DYNQUANT_INLINE inline __attribute__((always_inline))
#include "cpu/simd/bfloat16.h"
#include "cpu/simd/vector_128.h"
#include "epilogue_math.h"

using Math = EpilogueMath<V>;

double exact_gelu(double x) { return 0.5 * x * std::erfc(-x * M_SQRT1_2); }
double exact_gelu_tanh(double x) {
  return x / (1 + std::exp(-std::sqrt(8 / M_PI) * (x + 0.044715 * x * x * x)));
}
double exact_silu(double x) { return x / (1 + std::exp(-x)); }
double exact_quick_gelu(double x) { return x / (1 + std::exp(-1.702 * x)); }

struct Function {
  const char* name;
  V::F (*fast)(V::F);
  double (*exact)(double);
};
const Function kFunctions[] = {{"gelu", [](V::F x) { return Math::gelu(x); }, exact_gelu},
                               {"gelu_tanh", [](V::F x) { return Math::gelu_tanh(x); }, exact_gelu_tanh},
                               {"silu", [](V::F x) { return Math::silu(x); }, exact_silu},
                               {"quick_gelu", [](V::F x) { return Math::quick_gelu(x); }, exact_quick_gelu}};

struct Worst {
  double part = 0;
  float at = 0;
  int64_t wrong = 0;
};

void check(const Function& f, uint64_t begin, uint64_t end, uint64_t step, Worst* worst) {
  for (uint64_t bits = begin; bits < end; bits += V::kLanes * step) {
    float x[V::kLanes], y[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) {
      const uint32_t pattern = static_cast<uint32_t>(bits + i * step);
      std::memcpy(&x[i], &pattern, sizeof(float));
    }
    V::store(y, f.fast(V::load(x)));
    for (int i = 0; i < V::kLanes; ++i) {
      if (!std::isfinite(x[i])) {
        worst->wrong += std::isnan(x[i]) ? !std::isnan(y[i]) : y[i] != (x[i] > 0 ? x[i] : 0.0f);
        continue;
      }
      const double exact = f.exact(x[i]);
      const double part = std::fabs(y[i] - exact) / std::ldexp(std::fmax(std::fabs(exact), 0x1p-8), -18);
      if (!(part <= 1)) ++worst->wrong;
      if (part > worst->part) worst->part = part, worst->at = x[i];
    }
  }
}
}  // namespace
}  // namespace dynquant::cpu

int main(int argc, char** argv) {
  using namespace dynquant::cpu;
  const uint64_t step = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1, all = uint64_t{1} << 32;
  int64_t wrong = 0;
  for (const Function& f : kFunctions) {
    const unsigned count = std::max(1u, std::thread::hardware_concurrency());
    std::vector<Worst> worst(count);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < count; ++i) {
      threads.emplace_back(check, f, all * i / count, all * (i + 1) / count, step, &worst[i]);
    }
    Worst sum;
    for (unsigned i = 0; i < count; ++i) {
      threads[i].join();
      if (worst[i].part > sum.part) sum.part = worst[i].part, sum.at = worst[i].at;
      sum.wrong += worst[i].wrong;
    }
    std::printf("%-10s largest error %.4f of the bound, at x = %.9g; outside the bound: %lld\n", f.name,
                sum.part, sum.at, static_cast<long long>(sum.wrong));
    wrong += sum.wrong;
  }
  return wrong != 0;
}
