// Measured limits of this CPU, which the benchmarks set beside the kernels: int8 and fp32 arithmetic from
// registers alone, and the speed at which a buffer of a given size can be read. A library of its own, which
// benchmarks/cpu/probes.py compiles and calls through ctypes; no part of the package.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dynquant {
namespace {

struct ArithmeticProbe {
  const char* name;
  bool available;
  void (*run)(std::int64_t rounds);
  double operations_per_round;  // a multiplication and an addition are two
};

struct ReadProbe {
  const char* pattern;
  std::uint64_t (*read)(const void* bytes, std::size_t size);
};

constexpr std::size_t kReadGranule = 1024;  // whole unrolled steps of every pattern at every width

#if defined(__x86_64__)

// ---- arithmetic from registers: the limit that no kernel of this instruction can pass ----

// Written as assembly: each instruction once, no copies of a compiler's making between them.

namespace int8_avx2 {
#define TARGET __attribute__((target("avx2")))
using Register = __m256i;
// AVX2's way from 8-bit products to 32-bit sums.
TARGET inline __attribute__((always_inline)) Register multiply_add(Register acc, Register a, Register b) {
  const Register ones = _mm256_set1_epi16(1);
  Register pairs;
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(pairs)
      : "x"(a), "x"(b), "x"(ones));
  return acc;
}
#include "arithmetic.h"
#undef TARGET
}  // namespace int8_avx2

namespace int8_avxvnni {
#define TARGET __attribute__((target("avx2")))
using Register = __m256i;
TARGET inline __attribute__((always_inline)) Register multiply_add(Register acc, Register a, Register b) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
}
#include "arithmetic.h"
#undef TARGET
}  // namespace int8_avxvnni

namespace int8_avx512vl_vnni {
#define TARGET __attribute__((target("avx512f,avx512vl")))
using Register = __m256i;
TARGET inline __attribute__((always_inline)) Register multiply_add(Register acc, Register a, Register b) {
  asm("%{evex%} vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
#include "arithmetic.h"
#undef TARGET
}  // namespace int8_avx512vl_vnni

namespace int8_avx512vnni {
#define TARGET __attribute__((target("avx512f")))
using Register = __m512i;
TARGET inline __attribute__((always_inline)) Register multiply_add(Register acc, Register a, Register b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
#include "arithmetic.h"
#undef TARGET
}  // namespace int8_avx512vnni

namespace fp32_avx2 {
#define TARGET __attribute__((target("avx2,fma")))
using Register = __m256;
TARGET inline __attribute__((always_inline)) Register multiply_add(Register acc, Register a, Register b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  return acc;
}
#include "arithmetic.h"
#undef TARGET
}  // namespace fp32_avx2

namespace fp32_avx512 {
#define TARGET __attribute__((target("avx512f")))
using Register = __m512;
TARGET inline __attribute__((always_inline)) Register multiply_add(Register acc, Register a, Register b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
#include "arithmetic.h"
#undef TARGET
}  // namespace fp32_avx512

// ---- reading ----

namespace read_avx2 {
#define TARGET __attribute__((target("avx2")))
using Vector = std::uint64_t __attribute__((vector_size(32)));
#include "read.h"
#undef TARGET
}  // namespace read_avx2

namespace read_avx512 {
#define TARGET __attribute__((target("avx512f")))
using Vector = std::uint64_t __attribute__((vector_size(64)));
#include "read.h"
#undef TARGET
}  // namespace read_avx512

#endif  // __x86_64__

namespace read_baseline {
#define TARGET
using Vector = std::uint64_t __attribute__((vector_size(16)));
#include "read.h"
#undef TARGET
}  // namespace read_baseline

// ---- what runs on this CPU ----

std::vector<ArithmeticProbe> int8_probes() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
  const double ymm = int8_avx2::kChains * 32 * 2;
  return {
      {"avx2", avx2, int8_avx2::run, ymm},
      {"avxvnni", avx2 && __builtin_cpu_supports("avxvnni"), int8_avxvnni::run, ymm},
      {"avx512vl_vnni", avx512vnni && __builtin_cpu_supports("avx512vl"), int8_avx512vl_vnni::run, ymm},
      {"avx512vnni", avx512vnni, int8_avx512vnni::run, 2 * ymm},
  };
#else
  return {};
#endif
}

std::vector<ArithmeticProbe> fp32_probes() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const double ymm = fp32_avx2::kChains * 8 * 2;
  return {
      {"avx2", avx2, fp32_avx2::run, ymm},
      {"avx512", __builtin_cpu_supports("avx512f") != 0, fp32_avx512::run, 2 * ymm},
  };
#else
  return {};
#endif
}

std::vector<ReadProbe> widest_read_probes() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) {
    return read_avx512::read_probes();
  }
  if (__builtin_cpu_supports("avx2")) {
    return read_avx2::read_probes();
  }
#endif
  return read_baseline::read_probes();
}

// ---- timing ----

// The best rate, in units a nanosecond (giga-units a second), of calls repeated for about `seconds`.
template <typename Call>
double best_rate(const Call& call, double units_per_call, double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  double best_ns = 0;
  Clock::time_point stop;
  do {
    const auto start = Clock::now();
    call();
    stop = Clock::now();
    const double ns = std::chrono::duration<double, std::nano>(stop - start).count();
    best_ns = best_ns == 0 ? ns : std::min(best_ns, ns);
  } while (stop < end);
  return units_per_call / best_ns;
}

double arithmetic_rate(const ArithmeticProbe& probe, double seconds) {
  constexpr std::int64_t kRounds = 20000;  // about 50 microseconds: the clock's own cost vanishes
  return best_rate([&] { probe.run(kRounds); }, probe.operations_per_round * kRounds, seconds);
}

// NaN where there is no memory for the buffer.
double read_rate(const ReadProbe& probe, std::size_t size, double seconds) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  size = std::max(size / kReadGranule, std::size_t{1}) * kReadGranule;
  const std::unique_ptr<void, Free> buffer(std::aligned_alloc(kReadGranule, size));
  if (!buffer) {
    return NAN;
  }
  std::memset(buffer.get(), 1, size);
  // A small buffer is read several times between two looks at the clock.
  const std::size_t repeats = std::max(std::size_t{1}, (std::size_t{1} << 20) / size);
  volatile std::uint64_t sink = 0;
  const auto read = [&] {
    for (std::size_t i = 0; i < repeats; ++i) {
      sink = probe.read(buffer.get(), size);
    }
  };
  read();
  return best_rate(read, static_cast<double>(size * repeats), seconds);
}

// ---- C interface ----

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) {
    text += (text.empty() ? "" : ",") + name;
  }
  return text;
}

std::string isas() {
  std::vector<std::string> names;
  for (const ArithmeticProbe& probe : int8_probes()) {
    if (probe.available) {
      names.emplace_back(probe.name);
    }
  }
  return joined(names);
}

std::string read_patterns() {
  std::vector<std::string> names;
  for (const ReadProbe& probe : widest_read_probes()) {
    names.emplace_back(probe.pattern);
  }
  return joined(names);
}

}  // namespace
}  // namespace dynquant

// Names are separated by commas. Every probe runs on the calling thread; an unknown name gives NaN.
#define DYNQUANT_PROBE extern "C" __attribute__((visibility("default")))

// ISAs whose int8 limit this CPU can show.
DYNQUANT_PROBE const char* probe_isas() {
  static const std::string names = dynquant::isas();
  return names.c_str();
}

// GOPS of one core; a multiply-accumulate is 2 operations.
DYNQUANT_PROBE double probe_int8(const char* isa, double seconds) {
  for (const dynquant::ArithmeticProbe& probe : dynquant::int8_probes()) {
    if (probe.available && probe.name == std::string(isa)) {
      return dynquant::arithmetic_rate(probe, seconds);
    }
  }
  return NAN;
}

// GFLOPS of one core: FMA, widest vectors.
DYNQUANT_PROBE double probe_fp32(double seconds) {
  double best = 0;
  for (const dynquant::ArithmeticProbe& probe : dynquant::fp32_probes()) {
    if (probe.available) {
      best = std::max(best, dynquant::arithmetic_rate(probe, seconds));
    }
  }
  return best;
}

DYNQUANT_PROBE const char* probe_read_patterns() {
  static const std::string names = dynquant::read_patterns();
  return names.c_str();
}

// GB/s of one core, the buffer of `bytes` bytes read again and again.
DYNQUANT_PROBE double probe_read(const char* pattern, std::int64_t bytes, double seconds) {
  for (const dynquant::ReadProbe& probe : dynquant::widest_read_probes()) {
    if (probe.pattern == std::string(pattern)) {
      return dynquant::read_rate(probe, static_cast<std::size_t>(bytes), seconds);
    }
  }
  return NAN;
}
