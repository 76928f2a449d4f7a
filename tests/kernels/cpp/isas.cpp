#include "isas.h"

#include "cpu/isa/cpu_features.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/isa.h"

#define DYNQUANT_DECLARE(name, table, needs) extern const ::kernel_tests::Primitives table;
namespace native_primitives::cpu {
DYNQUANT_ISAS(DYNQUANT_DECLARE)
}
#if defined(__x86_64__)
namespace emulated_primitives::cpu {
DYNQUANT_X86_ISAS(DYNQUANT_DECLARE)
}
#endif
#undef DYNQUANT_DECLARE

namespace kernel_tests {
namespace {

std::vector<Isa> find_all() {
  const dynquant::cpu::CpuFeatures cpu;
  (void)cpu;
  std::vector<Isa> all;
  const auto add = [&](const std::string& name, const Primitives& table, const std::string& skipped) {
    all.push_back({name, &table, skipped});
    if (table.few_rows != nullptr) all.push_back({name + ", few rows", table.few_rows, skipped});
  };
#define DYNQUANT_ADD(name, table, needs) \
  add(#name, native_primitives::cpu::table, (needs) ? "" : "this CPU lacks " #needs);
  DYNQUANT_ISAS(DYNQUANT_ADD)
#undef DYNQUANT_ADD
#if defined(__x86_64__)
  const char* lacks_avx2 =
      cpu.avx2 && cpu.f16c && cpu.fma ? "" : "this CPU lacks (cpu.avx2 && cpu.f16c && cpu.fma)";
  add("avxvnni, emulated", emulated_primitives::cpu::kAvxVnni, lacks_avx2);
  add("avx512vl_vnni, emulated", emulated_primitives::cpu::kAvx512VlVnni, lacks_avx2);
  add("avx512vnni, emulated", emulated_primitives::cpu::kAvx512Vnni, lacks_avx2);
#endif
  return all;
}

}  // namespace

const std::vector<Isa>& primitives_of_isas() {
  static const std::vector<Isa> all = find_all();
  return all;
}

std::vector<Isa> runnable_primitives() {
  std::vector<Isa> found;
  for (const Isa& isa : primitives_of_isas()) {
    if (isa.skipped.empty()) found.push_back(isa);
  }
  return found;
}

std::vector<std::string> runnable_kernels() { return dynquant::cpu::available_isas(); }

}  // namespace kernel_tests
