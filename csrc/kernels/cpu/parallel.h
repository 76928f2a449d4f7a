// Threads, which the caller of this library provides.
#pragma once

#include <cstdint>

#include "cpu/isa/thread_scope.h"

namespace dynquant::cpu {

class Parallel {
 public:
  // The number of threads that run() can use, including the calling one.
  virtual int64_t threads() const = 0;

  // Whether the calling thread is inside a parallel region already.
  virtual bool in_region() const = 0;

  // Calls task(t) for each t in [0, tasks), each on its own thread if there are enough, and within `scope` on
  // each thread.
  template <typename Task>
  void run(const ThreadScope& scope, int64_t tasks, const Task& task) const {
    const auto run_some = [&](int64_t begin, int64_t end) {
      const InThreadScope in_scope(scope);
      for (int64_t t = begin; t < end; ++t) task(t);
    };
    if (tasks == 1) return run_some(0, 1);
    using RunSome = decltype(run_some);
    run_on_threads(tasks, &run_some, [](const void* state, int64_t begin, int64_t end) {
      (*static_cast<const RunSome*>(state))(begin, end);
    });
  }

 protected:
  ~Parallel() = default;

  // Calls some(state, begin, end) on several threads, for ranges that cover [0, tasks); returns after the
  // last.
  virtual void run_on_threads(int64_t tasks, const void* state,
                              void (*some)(const void* state, int64_t begin, int64_t end)) const = 0;
};

}  // namespace dynquant::cpu
