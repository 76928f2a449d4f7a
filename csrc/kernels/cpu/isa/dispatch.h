// Which instruction set runs. Chosen once from the CPU, lowered by the environment variable DYNQUANT_ISA.
#pragma once

#include <string>
#include <vector>

namespace dynquant::cpu {

// Names of the instruction sets that this CPU can run, lowest first.
std::vector<std::string> available_isas();

// The one in use, and a way to force a lower one (tests run them all). Throws std::invalid_argument for a
// name that is not available.
std::string isa();
void set_isa(const std::string& name);

}  // namespace dynquant::cpu
