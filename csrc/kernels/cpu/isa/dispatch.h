// The instruction set in use: chosen once from the CPU, or lowered by the environment variable DYNQUANT_ISA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace dynquant::cpu {

// Names of the instruction sets that this CPU can run, lowest first.
std::vector<std::string> available_isas();

// The instruction set in use; set_isa forces another available one (tests run all of them) and throws
// std::invalid_argument for any other name.
std::string isa();
void set_isa(const std::string& name);

// The kernels of the instruction set in use, and those for a GEMM of m rows, by weights that may hold -128.
const KernelTable& kernels();
const KernelTable& kernels_of_rows(int64_t m, bool full_range);

}  // namespace dynquant::cpu
