// Threads: how many a call's work is worth, and its tasks on them.
#pragma once

#include <ATen/Parallel.h>

#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/kernel_table.h"

namespace dynquant::cpu {

// A parallel region costs microseconds at best, and milliseconds on a busy machine: a call that is done in kAlone on
// one thread stays there, and a longer one gets a thread for each kShare.
constexpr double kAloneMicroseconds = 50.0, kShareMicroseconds = 25.0;

inline int64_t threads_for(double microseconds) {
  if (microseconds < kAloneMicroseconds || at::in_parallel_region()) return 1;
  return std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(microseconds / kShareMicroseconds));
}

// What one core takes, about, to read a weight that an earlier call has read.
inline double microseconds_to_read(double bytes) {
  constexpr double kFromL2 = 100e3, kFromL3 = 50e3, kFromIntelL3 = 30e3;  // bytes a microsecond, measured
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

// Calls task(t) for each t in [0, tasks), each on a thread of its own where torch has as many.
template <typename Task>
void run(int64_t tasks, const Task& task) {
  const auto run_some = [&](int64_t begin, int64_t end) {
    const FloatEnvironment environment;
    for (int64_t t = begin; t < end; ++t) task(t);
  };
  tasks == 1 ? run_some(0, 1) : at::parallel_for(0, tasks, 1, run_some);
}

// Share t of `parts` nearly equal shares of [0, total).
inline std::pair<int64_t, int64_t> share(int64_t total, int64_t parts, int64_t t) {
  return {total * t / parts, total * (t + 1) / parts};
}

}  // namespace dynquant::cpu
