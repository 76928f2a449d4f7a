// Registration of the autograd kernels that dynquant/ops/registry.py asks for.
#pragma once

#include <string>

namespace dynquant {

// An op without gradient: its results require none.
void run_below_autograd(const std::string& name);

}  // namespace dynquant
