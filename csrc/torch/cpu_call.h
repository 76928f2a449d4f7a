// Shared by the CPU bindings: tensors as rows, memory for the length of a call, torch's threads.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>

#include "checks.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace dynquant::cpu {

// torch's own threads; in parallel.cpp.
const Parallel& torch_threads();

// fp64 as fp32, or fp32 as fp64: contiguous, with denormals; in cast_cpu.cpp.
at::Tensor cast(const at::Tensor& x, at::ScalarType type);

// x as rows; `owner` keeps a copy alive if one is needed (fp64, rows with strided elements).
inline Rows rows_of(const at::Tensor& x, Rotation rotation, at::Tensor& owner) {
  owner = x.scalar_type() == at::kDouble ? cast(x, at::kFloat) : x;
  const int64_t k = owner.size(-1);
  const bool strided_rows = owner.dim() == 2 && owner.stride(1) == 1;
  if (!strided_rows && !owner.is_contiguous()) owner = owner.contiguous();
  return Rows{owner.const_data_ptr(),
              dtype_of(owner.scalar_type()),
              leading_size(x),
              k,
              strided_rows ? owner.stride(0) : k,
              rotation};
}

// Memory for the length of a call, on the stack for small calls: an allocation would cost as much as their
// work.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof(small_))) {
      large_ = c10::GetCPUAllocator()->allocate(static_cast<size_t>(bytes));
    }
  }

  void* data() { return large_ ? large_.get() : small_; }

 private:
  alignas(64) uint8_t small_[8192];
  at::DataPtr large_;
};

}  // namespace dynquant::cpu
