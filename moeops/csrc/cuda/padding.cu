// pad_rows and unpad_rows on CUDA.
#include <torch/csrc/stable/library.h>

#include "common.h"
#include "kernels/padding.cuh"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarpSize;

// Runs f(word, words per row) with the widest word that both tensors can be moved in.
template <typename F>
void dispatch_words(const Tensor& from, const Tensor& to, int64_t columns, const F& f) {
  const int64_t bytes = columns * static_cast<int64_t>(from.element_size());
  const auto address = reinterpret_cast<uintptr_t>(from.data_ptr()) |
                       reinterpret_cast<uintptr_t>(to.data_ptr()) | static_cast<uintptr_t>(bytes);
  if (address % sizeof(uint4) == 0) {
    f(uint4{}, bytes / static_cast<int64_t>(sizeof(uint4)));
  } else if (address % sizeof(uint32_t) == 0) {
    f(uint32_t{}, bytes / static_cast<int64_t>(sizeof(uint32_t)));
  } else {
    f(uint16_t{}, bytes / static_cast<int64_t>(sizeof(uint16_t)));
  }
}

Tensor pad_rows(const Tensor& rows, const Tensor& expert_offsets, int64_t capacity) {
  constexpr auto kOp = "pad_rows";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  check_offsets(kOp, expert_offsets, rows);
  STD_TORCH_CHECK(capacity >= 0, kOp, ": capacity must be at least 0, got ", capacity,
                  ". Pass rows per expert.");
  DeviceGuard guard(rows.get_device_index());
  const int64_t num_experts = expert_offsets.size(0) - 1;
  Tensor padded = empty_on(rows, {num_experts, capacity, rows.size(1)}, rows.scalar_type());
  if (padded.numel() == 0) return padded;
  const Tensor source = as_contiguous(rows), offsets = as_contiguous(expert_offsets);
  dispatch_words(source, padded, rows.size(1), [&](auto word, int64_t width) {
    using Word = decltype(word);
    pad_rows_kernel<Word><<<grid_blocks(num_experts * capacity, kWarpsPerBlock), kThreads, 0,
                            current_stream(rows)>>>(static_cast<const Word*>(source.data_ptr()),
                                                    static_cast<const int32_t*>(offsets.data_ptr()),
                                                    rows.size(0), num_experts, capacity, width,
                                                    static_cast<Word*>(padded.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return padded;
}

Tensor unpad_rows(const Tensor& padded, const Tensor& expert_offsets, int64_t num_rows) {
  constexpr auto kOp = "unpad_rows";
  check_dim(kOp, "padded", padded, 3);
  check_float(kOp, "padded", padded);
  check_offsets(kOp, expert_offsets, padded);
  check_size(kOp, "padded", padded, 0, expert_offsets.size(0) - 1);
  STD_TORCH_CHECK(num_rows >= 0, kOp, ": num_rows must be at least 0, got ", num_rows,
                  ". Pass the number of rows.");
  DeviceGuard guard(padded.get_device_index());
  Tensor rows = empty_on(padded, {num_rows, padded.size(2)}, padded.scalar_type());
  if (rows.numel() == 0) return rows;
  const Tensor source = as_contiguous(padded), offsets = as_contiguous(expert_offsets);
  dispatch_words(source, rows, padded.size(2), [&](auto word, int64_t width) {
    using Word = decltype(word);
    unpad_rows_kernel<Word>
        <<<grid_blocks(num_rows, kWarpsPerBlock), kThreads, 0, current_stream(padded)>>>(
            static_cast<const Word*>(source.data_ptr()),
            static_cast<const int32_t*>(offsets.data_ptr()), num_rows,
            static_cast<int>(offsets.size(0) - 1), padded.size(1), width,
            static_cast<Word*>(rows.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("pad_rows", TORCH_BOX(&pad_rows));
  m.impl("unpad_rows", TORCH_BOX(&unpad_rows));
}

}  // namespace moeops::cuda
