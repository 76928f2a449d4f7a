// Memory of exactly the size that a kernel may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace kernel_tests {

// `count` elements that end at a page without access: a read or write behind the last one faults, under every
// build. Filled with 0xa5: an element that nobody wrote shows. Writes before the first element are found by
// intact(). The start is aligned to 64 bytes only if the size is a multiple of 64.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)),
                 bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t readable = (bytes + kFront + page - 1) / page * page;
    size_ = readable + page;
    void* at = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(at);
    mprotect(memory_ + readable, page, PROT_NONE);
    std::memset(memory_, kPoison, readable);
    data_ = reinterpret_cast<T*>(memory_ + readable - bytes);
  }
  template <typename Source>
  static Guarded copy_of(const std::vector<Source>& values) {
    static_assert(sizeof(Source) == sizeof(T));
    Guarded copy(static_cast<int64_t>(values.size()));
    if (!values.empty()) std::memcpy(copy.data(), values.data(), values.size() * sizeof(T));
    return copy;
  }
  Guarded(Guarded&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        size_(other.size_),
        data_(other.data_),
        count_(other.count_) {}
  Guarded& operator=(Guarded&&) = delete;
  ~Guarded() {
    if (memory_ != nullptr) munmap(memory_, size_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  // Whether the bytes before the first element are as they were.
  bool intact() const {
    for (const uint8_t* at = memory_; at < reinterpret_cast<const uint8_t*>(data_); ++at) {
      if (*at != kPoison) return false;
    }
    return true;
  }

  bool is_poison(int64_t i) const {
    T poison;
    std::memset(static_cast<void*>(&poison), kPoison, sizeof(T));
    return std::memcmp(&data_[i], &poison, sizeof(T)) == 0;
  }

 private:
  static constexpr size_t kFront = 64;
  static constexpr int kPoison = 0xa5;

  uint8_t* memory_;
  size_t size_;
  T* data_;
  int64_t count_;
};

}  // namespace kernel_tests
