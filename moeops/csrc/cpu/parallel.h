// Threads for the CPU kernels. A body handed to another thread must not throw: it reports to
// FirstError instead, and the caller checks afterwards.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

// Compiles a function once per vector width; the loader picks the widest that the processor has.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define MOEOPS_WIDEST_VECTORS \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MOEOPS_WIDEST_VECTORS
#endif

namespace moeops::cpu {

// Elements per task for memory-bound loops: some 10 us of work, several times what waking a thread
// costs.
constexpr int64_t kGrainElements = 16384;

// Rows per task for rows of this many elements.
inline int64_t grain_rows(int64_t row_elements) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, row_elements));
}

// Lowest position at which any thread met a bad value.
class FirstError {
 public:
  void report(int64_t position) noexcept {
    int64_t seen = position_.load(std::memory_order_relaxed);
    while (position < seen && !position_.compare_exchange_weak(seen, position)) {
    }
  }
  bool found() const noexcept { return position() != kNone; }
  int64_t position() const noexcept { return position_.load(); }

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> position_{kNone};
};

// [0, size) cut into at most one range per thread, so that each range can own scratch memory that
// was allocated before the threads start.
class Ranges {
 public:
  Ranges(int64_t size, int64_t grain) : size_(size) {
    const int64_t tasks = (size + grain - 1) / grain;
    const int64_t threads = torch::stable::get_num_threads();
    count_ = std::max<int64_t>(1, std::min(tasks, threads));
    length_ = (size + count_ - 1) / count_;
  }

  int64_t count() const { return count_; }

  // body(range, begin, end), every range once, in parallel.
  template <typename Body>
  void run(const Body& body) const {
    torch::stable::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = std::min(size_, i * length_);
        body(i, begin, std::min(size_, begin + length_));
      }
    });
  }

 private:
  int64_t size_;
  int64_t count_;
  int64_t length_;
};

}  // namespace moeops::cpu
