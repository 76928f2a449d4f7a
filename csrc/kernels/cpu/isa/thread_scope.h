// The state of a thread while it runs kernels: modes and registers that an instruction set needs set up.
#pragma once

#include <cstdint>

namespace dynquant::cpu {

// What an instruction set does before the first kernel on a thread and after the last. Scopes nest, and a
// scope may be entered on several threads at once.
struct ThreadScope {
  uint64_t (*enter)();            // returns the state that leave() restores
  void (*leave)(uint64_t saved);  // on the thread that entered
};

// The floating-point modes that every kernel expects: rounding to nearest even, denormals kept, no trap. They
// are per thread: torch.set_flush_denormal, for one, changes them. An instruction set with further state
// (AMX: the tile configuration) has a scope of its own, which begins and ends with this one.
extern const ThreadScope kFloatModes;

// Enters a scope for its lifetime.
class InThreadScope {
 public:
  explicit InThreadScope(const ThreadScope& scope) : scope_(scope), saved_(scope.enter()) {}
  ~InThreadScope() { scope_.leave(saved_); }
  InThreadScope(const InThreadScope&) = delete;
  InThreadScope& operator=(const InThreadScope&) = delete;

 private:
  const ThreadScope& scope_;
  const uint64_t saved_;
};

}  // namespace dynquant::cpu
