// Registration of the autograd kernels that dynquant/ops/registry.py asks for.
#pragma once

#include <string>

namespace dynquant {

// An op without gradient: its results require none, or it refuses inputs that do.
void run_below_autograd(const std::string& name, bool refuses_gradients);

}  // namespace dynquant
