// Which instruction set runs. Chosen once from the CPU, lowered by the environment variable DYNQUANT_ISA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace dynquant::cpu {

// Names of the instruction sets that this CPU can run, lowest first.
std::vector<std::string> available_isas();

// The one in use, and a way to force a lower one (tests run them all). Throws std::invalid_argument for a
// name that is not available.
std::string isa();
void set_isa(const std::string& name);

// The kernels of the instruction set in use, and those for a GEMM of m rows.
const KernelTable& kernels();
const KernelTable& kernels_of_rows(int64_t m);

}  // namespace dynquant::cpu
