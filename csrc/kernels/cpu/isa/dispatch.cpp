#include "cpu/isa/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/isa/cpu_features.h"
#include "cpu/isa/isa.h"
#include "cpu/kernel_table.h"

namespace dynquant::cpu {

#define DYNQUANT_DECLARE(name, table, needs) extern const KernelTable table;
DYNQUANT_ISAS(DYNQUANT_DECLARE)
#undef DYNQUANT_DECLARE

namespace {

const std::vector<const KernelTable*>& available() {
  static const std::vector<const KernelTable*> tables = [] {
    const CpuFeatures cpu;
    (void)cpu;
    std::vector<const KernelTable*> found;
#define DYNQUANT_FIND(name, table, needs) \
  if (needs) found.push_back(&table);
    DYNQUANT_ISAS(DYNQUANT_FIND)
#undef DYNQUANT_FIND
    return found;
  }();
  return tables;
}

const KernelTable* find(const std::string& name) {
  std::string names;
  for (const KernelTable* table : available()) {
    if (name == table->name) return table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw std::invalid_argument("dynquant: expected an instruction set that this CPU has (" + names +
                              "), got '" + name + "'");
}

std::atomic<const KernelTable*>& in_use() {
  static std::atomic<const KernelTable*> table([] {
    const char* forced = std::getenv("DYNQUANT_ISA");
    return forced != nullptr && *forced != '\0' ? find(forced) : available().back();
  }());
  return table;
}

}  // namespace

const KernelTable& kernels() { return *in_use().load(std::memory_order_relaxed); }

const KernelTable& kernels_of_rows(int64_t m, bool full_range) {
  const KernelTable& all = kernels();
  if (full_range && all.full_range != nullptr) return *all.full_range;
  return all.few_rows != nullptr && 1 < m && m <= kFewRows ? *all.few_rows : all;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : available()) names.emplace_back(table->name);
  return names;
}

std::string isa() { return kernels().name; }

void set_isa(const std::string& name) { in_use().store(find(name), std::memory_order_relaxed); }

}  // namespace dynquant::cpu
