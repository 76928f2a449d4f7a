// Implementations of Parallel, as different as callers may be.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace kernel_tests {

class Threads : public dynquant::cpu::Parallel {
 public:
  virtual ~Threads() = default;
  virtual std::string name() const = 0;
};

// All tasks on the calling thread, one by one, the last first.
class Backwards final : public Threads {
 public:
  explicit Backwards(int64_t threads) : threads_(threads) {}
  std::string name() const override { return "one thread backwards of " + std::to_string(threads_); }
  int64_t threads() const override { return threads_; }
  bool in_region() const override { return false; }

 protected:
  void run_on_threads(int64_t tasks, const void* state,
                      void (*some)(const void* state, int64_t begin, int64_t end)) const override {
    for (int64_t t = tasks; t-- > 0;) some(state, t, t + 1);
  }

 private:
  const int64_t threads_;
};

// New threads for each region, each with one range of tasks; the calling thread takes the first.
class StdThreads final : public Threads {
 public:
  explicit StdThreads(int64_t threads) : threads_(threads) {}
  std::string name() const override { return std::to_string(threads_) + " threads"; }
  int64_t threads() const override { return threads_; }
  bool in_region() const override { return false; }

 protected:
  void run_on_threads(int64_t tasks, const void* state,
                      void (*some)(const void* state, int64_t begin, int64_t end)) const override {
    const int64_t parts = std::max<int64_t>(1, std::min(tasks, threads_));
    std::vector<std::thread> others;
    for (int64_t p = 1; p < parts; ++p) {
      others.emplace_back([=, this] { some(state, tasks * p / parts, tasks * (p + 1) / parts); });
    }
    some(state, 0, tasks / parts);
    for (std::thread& other : others) other.join();
  }

 private:
  const int64_t threads_;
};

// A caller that is in a parallel region already: everything stays on its thread.
class InRegion final : public Threads {
 public:
  std::string name() const override { return "in a region"; }
  int64_t threads() const override { return 4; }
  bool in_region() const override { return true; }

 protected:
  void run_on_threads(int64_t tasks, const void* state,
                      void (*some)(const void* state, int64_t begin, int64_t end)) const override {
    some(state, 0, tasks);
  }
};

inline const std::vector<std::unique_ptr<Threads>>& all_threads() {
  static const auto all = [] {
    std::vector<std::unique_ptr<Threads>> made;
    for (const int64_t threads : {1, 2, 3, 4}) made.push_back(std::make_unique<StdThreads>(threads));
    made.push_back(std::make_unique<Backwards>(4));
    made.push_back(std::make_unique<InRegion>());
    return made;
  }();
  return all;
}

}  // namespace kernel_tests
