// The floating-point modes that every kernel expects.
#pragma once

namespace dynquant::cpu {

// Sets MXCSR for its lifetime: torch.set_flush_denormal, which is per thread, would change bits.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  unsigned saved_;
};

}  // namespace dynquant::cpu
