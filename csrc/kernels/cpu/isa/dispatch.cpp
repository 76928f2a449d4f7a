#include "cpu/isa/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "cpu/isa/isa.h"
#include "cpu/kernel_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace dynquant::cpu {

#define DYNQUANT_DECLARE(name, table, needs) extern const Kernels table;
DYNQUANT_ISAS(DYNQUANT_DECLARE)
#undef DYNQUANT_DECLARE

namespace {

// What the CPU has and the operating system saves.
struct CpuFeatures {
  bool avx2 = false, f16c = false, avxvnni = false, avx512 = false, avx512vnni = false;

  CpuFeatures() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return;
    const bool has_f16c = (c & bit_F16C) != 0;
    unsigned saved, high;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const bool saves_ymm = (saved & 0x6) == 0x6, saves_zmm = (saved & 0xe6) == 0xe6;
    if (!saves_ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    f16c = has_f16c;
    avx2 = (b & bit_AVX2) != 0;
    const unsigned avx512_bits = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    avx512 = saves_zmm && (b & avx512_bits) == avx512_bits;
    avx512vnni = (c & (1u << 11)) != 0;
    const unsigned subleaves = a;
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avxvnni = (a & (1u << 4)) != 0;
#endif
  }
};

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> tables = [] {
    const CpuFeatures cpu;
    (void)cpu;
    std::vector<const Kernels*> found;
#define DYNQUANT_FIND(name, table, needs) \
  if (needs) found.push_back(&table);
    DYNQUANT_ISAS(DYNQUANT_FIND)
#undef DYNQUANT_FIND
    return found;
  }();
  return tables;
}

const Kernels* find(const std::string& name) {
  std::string names;
  for (const Kernels* table : available()) {
    if (name == table->name) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("dynquant: expected an instruction set that this CPU has (" + names +
                              "), got '" + name + "'");
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> table([] {
    const char* forced = std::getenv("DYNQUANT_ISA");
    return forced != nullptr && *forced != '\0' ? find(forced) : available().back();
  }());
  return table;
}

}  // namespace

const Kernels& kernels() { return *in_use().load(std::memory_order_relaxed); }

const Kernels& kernels_of_rows(int64_t m) {
  const Kernels& all = kernels();
  return all.few_rows != nullptr && 1 < m && m <= kFewRows ? *all.few_rows : all;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.emplace_back(table->name);
  return names;
}

std::string isa() { return kernels().name; }

void set_isa(const std::string& name) { in_use().store(find(name), std::memory_order_relaxed); }

QParams choose_qparams(Range range) {
  if (!std::isfinite(range.lo) || !std::isfinite(range.hi)) return QParams{std::nanf(""), 0};
  const float width = range.hi / 255.0f - range.lo / 255.0f;
  const float scale = width < 0x1p-126f ? 0x1p-126f : width;
  const float inv_scale = 1.0f / scale;
  const long zero_point =
      std::lrint(-128.0f - range.lo * inv_scale);  // x86 rounds it to nearest even in one instruction
  return QParams{scale, static_cast<int32_t>(std::clamp(zero_point, -128l, 127l))};
}

#if defined(__x86_64__)
FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) {
  constexpr unsigned kNearestAllMasked = 0x1f80;
  if (saved_ != kNearestAllMasked) _mm_setcsr(kNearestAllMasked);
}
FloatEnvironment::~FloatEnvironment() { _mm_setcsr(saved_); }
#else
FloatEnvironment::FloatEnvironment() : saved_(0) {}
FloatEnvironment::~FloatEnvironment() = default;
#endif

}  // namespace dynquant::cpu
