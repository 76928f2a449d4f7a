// The instruction sets of isa.h as the tests see them.
#pragma once

#include <string>
#include <vector>

#include "primitives.h"

namespace kernel_tests {

// The primitives of one instruction set. `skipped`: why they do not run here, or empty.
struct Isa {
  std::string name;
  const Primitives* primitives;
  std::string skipped;
};

// Every instruction set of isa.h, then those with emulated intrinsics.
const std::vector<Isa>& primitives_of_isas();

// Those that run on this CPU.
std::vector<Isa> runnable_primitives();

// Names for set_isa.
std::vector<std::string> runnable_kernels();

}  // namespace kernel_tests
