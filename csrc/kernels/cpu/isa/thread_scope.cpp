#include "cpu/isa/thread_scope.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dynquant::cpu {
namespace {

#if defined(__x86_64__)
// MXCSR: nearest even, no flush to zero (FTZ, DAZ), all exceptions masked, no flag raised.
constexpr uint64_t kModes = 0x1f80;

uint64_t modes() { return _mm_getcsr(); }
void set_modes(uint64_t modes) { _mm_setcsr(static_cast<unsigned>(modes)); }
#elif defined(__aarch64__)
// FPCR: nearest even, no flush to zero (FZ, FZ16, FIZ), NaNs propagate (DN), IEEE half precision (AHP), no
// trap.
constexpr uint64_t kModes = 0;

uint64_t modes() {
  uint64_t modes;
  __asm__ volatile("mrs %0, fpcr" : "=r"(modes));
  return modes;
}
void set_modes(uint64_t modes) { __asm__ volatile("msr fpcr, %0" : : "r"(modes) : "memory"); }
#else  // the platform's defaults
constexpr uint64_t kModes = 0;

uint64_t modes() { return kModes; }
void set_modes(uint64_t) {}
#endif

uint64_t enter() {
  const uint64_t saved = modes();
  if (saved != kModes) set_modes(kModes);
  return saved;
}

}  // namespace

extern const ThreadScope kFloatModes = {enter, set_modes};

}  // namespace dynquant::cpu
