// torch's threads for the kernel library.

#include <ATen/Parallel.h>

#include "cpu/parallel.h"

namespace dynquant::cpu {
namespace {

class TorchThreads final : public Parallel {
 public:
  int64_t threads() const override { return at::get_num_threads(); }

  bool in_region() const override { return at::in_parallel_region(); }

 protected:
  void run_on_threads(int64_t tasks, const void* state,
                      void (*some)(const void* state, int64_t begin, int64_t end)) const override {
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { some(state, begin, end); });
  }
};

}  // namespace

const Parallel& torch_threads() {
  static const TorchThreads threads;
  return threads;
}

}  // namespace dynquant::cpu
