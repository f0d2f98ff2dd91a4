// Threads for the CPU kernels. A body handed to parallel_for or to Ranges must not throw: it
// reports to FirstError instead, and the caller checks afterwards. A body of Tasks may throw.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
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

// Tasks of unequal length, such as experts: the next free thread takes the next task, so the
// longest should come first. With fewer tasks than threads the calling thread works through all of
// them, and what runs inside a task, torch's mm or a parallel_for, uses every thread instead.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {
    const int64_t threads = torch::stable::get_num_threads();
    num_workers_ = count >= threads ? std::max<int64_t>(1, threads) : 1;
  }

  // Bodies that run at the same time, each of which can own scratch memory.
  int64_t num_workers() const { return num_workers_; }

  // body(worker, task), every task once; throws what a body threw first, when all threads have
  // stopped.
  template <typename Body>
  void run(const Body& body) const {
    if (num_workers_ == 1) {
      for (int64_t task = 0; task < count_; ++task) body(int64_t(0), task);
      return;
    }
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    torch::stable::parallel_for(0, num_workers_, 1, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker) {
        try {
          for (int64_t task = next++; task < count_ && !failed; task = next++) body(worker, task);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
    });
    if (error) std::rethrow_exception(error);
  }

 private:
  int64_t count_;
  int64_t num_workers_;
};

}  // namespace moeops::cpu
