// The number of threads for a call's work, and each thread's share of it.
#pragma once

#include <cstdint>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace dynquant::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Share {
  int64_t begin, end;
};

// Share t of `parts` nearly equal shares of [0, total).
inline Share share(int64_t total, int64_t parts, int64_t t) {
  return {total * t / parts, total * (t + 1) / parts};
}

// From 1 to parallel.threads().
int64_t threads_for(double microseconds, const Parallel& parallel);

// For the range, the quantization or the rotation of x: from 1 to one thread per row.
int64_t threads_over_rows(const Rows& x, const Parallel& parallel);

// Estimate for one core to read a weight again after an earlier call.
double microseconds_to_read(double bytes);

// Bytes of `count` elements in a workspace, whose pieces start at cache lines.
template <typename T>
constexpr int64_t piece_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

}  // namespace dynquant::cpu
