#include "cpu/partition.h"

#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>

namespace dynquant::cpu {

int64_t threads_for(double microseconds, const Parallel& parallel) {
  // A parallel region costs microseconds at best, and milliseconds on a busy machine: work below kAlone stays
  // on the calling thread; longer work gets one thread per kShare.
  constexpr double kAlone = 50.0, kShare = 25.0;
  if (microseconds < kAlone || parallel.in_region()) return 1;
  return std::min(parallel.threads(), static_cast<int64_t>(microseconds / kShare));
}

int64_t threads_over_rows(const Rows& x, const Parallel& parallel) {
  constexpr double kFloatsPerMicrosecond = 4e3;  // of one core
  const double floats = static_cast<double>(x.m) * static_cast<double>(x.k);
  return std::max<int64_t>(1, std::min(x.m, threads_for(floats / kFloatsPerMicrosecond, parallel)));
}

double microseconds_to_read(double bytes) {
  constexpr double kFromL2 = 100e3, kFromL3 = 50e3;  // bytes a microsecond, measured
  [[maybe_unused]] constexpr double kFromIntelL3 = 30e3;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const double l2 = static_cast<double>(sysconf(_SC_LEVEL2_CACHE_SIZE));
#else
  static const double l2 = 0.0;
#endif
#if defined(__x86_64__)
  static const double from_l3 = __builtin_cpu_is("intel") ? kFromIntelL3 : kFromL3;
#else
  static const double from_l3 = kFromL3;
#endif
  return bytes / (bytes <= l2 ? kFromL2 : from_l3);
}

}  // namespace dynquant::cpu
