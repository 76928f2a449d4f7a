// Found before csrc/kernels/cpu/kernel_table.h: a table of an instruction set's primitives takes the place of
// the table of its kernels.
#pragma once

#define KernelTable TableOfKernels
#include "../../../../../csrc/kernels/cpu/kernel_table.h"
#undef KernelTable

#include "primitives.h"

namespace dynquant::cpu {
using KernelTable = ::kernel_tests::Primitives;
}  // namespace dynquant::cpu
