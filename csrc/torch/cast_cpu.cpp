// Casts between fp64 and fp32 that keep denormals, whatever torch.set_flush_denormal set on the threads.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "cpu/isa/thread_scope.h"
#include "cpu_call.h"

namespace dynquant::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements for which a second thread pays

// A function of its own, so that no conversion moves out of the scope that its caller enters.
template <typename From, typename To>
[[gnu::noinline]] void cast_values(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

template <typename From, typename To>
void cast_all(const at::Tensor& from, const at::Tensor& to) {
  const From* source = from.const_data_ptr<From>();
  To* target = to.mutable_data_ptr<To>();
  at::parallel_for(0, from.numel(), kGrain, [&](int64_t begin, int64_t end) {
    const InThreadScope scope(kFloatModes);
    cast_values(source + begin, target + begin, end - begin);
  });
}

}  // namespace

at::Tensor cast(const at::Tensor& x, at::ScalarType type) {
  const at::Tensor from = x.contiguous();
  const at::Tensor to = at::empty(from.sizes(), from.options().dtype(type));
  if (type == at::kFloat) {
    cast_all<double, float>(from, to);
  } else {
    cast_all<float, double>(from, to);
  }
  return to;
}

}  // namespace dynquant::cpu
