#include "cpu/isa/float_environment.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dynquant::cpu {

#if defined(__x86_64__)
FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) {
  constexpr unsigned kNearestAllMasked = 0x1f80;
  if (saved_ != kNearestAllMasked) _mm_setcsr(kNearestAllMasked);
}
FloatEnvironment::~FloatEnvironment() { _mm_setcsr(saved_); }
#else
FloatEnvironment::FloatEnvironment() : saved_(0) {}
FloatEnvironment::~FloatEnvironment() = default;
#endif

}  // namespace dynquant::cpu
