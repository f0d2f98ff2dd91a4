// pad_rows and unpad_rows on the CPU: whole rows are copied or cleared, one thread per range of
// target rows.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "cpu/plan.h"

namespace moeops::cpu {
namespace {

Tensor pad_rows(const Tensor& rows, const Tensor& expert_offsets, int64_t capacity) {
  constexpr const char* kOp = "pad_rows";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  STD_TORCH_CHECK(capacity >= 0, kOp, ": capacity must be at least 0, got ", capacity,
                  ". Pass rows per expert.");
  const Offsets offsets = read_offsets(kOp, expert_offsets, rows, rows.size(0));
  const int64_t num_columns = rows.size(1);
  Tensor padded = torch::stable::new_empty(rows, {offsets.num_experts, capacity, num_columns});
  if (padded.numel() == 0) return padded;

  const Tensor source = as_contiguous(rows);
  const auto row_bytes = static_cast<size_t>(num_columns) * rows.element_size();
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(padded.mutable_data_ptr());
  torch::stable::parallel_for(0, offsets.num_experts * capacity, grain_rows(num_columns),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t slot = begin; slot < end; ++slot) {
                                  const int64_t expert = slot / capacity;
                                  const int64_t row = offsets.begin(expert) + slot % capacity;
                                  char* target = to + slot * row_bytes;
                                  if (row < offsets.end(expert)) {
                                    std::memcpy(target, from + row * row_bytes, row_bytes);
                                  } else {
                                    std::memset(target, 0, row_bytes);
                                  }
                                }
                              });
  return padded;
}

Tensor unpad_rows(const Tensor& padded, const Tensor& expert_offsets, int64_t num_rows) {
  constexpr const char* kOp = "unpad_rows";
  check_dim(kOp, "padded", padded, 3);
  check_float(kOp, "padded", padded);
  STD_TORCH_CHECK(num_rows >= 0, kOp, ": num_rows must be at least 0, got ", num_rows,
                  ". Pass the number of rows.");
  const Offsets offsets = read_offsets(kOp, expert_offsets, padded, num_rows);
  check_size(kOp, "padded", padded, 0, offsets.num_experts);
  const int64_t capacity = padded.size(1);
  const int64_t num_columns = padded.size(2);
  Tensor rows = torch::stable::new_empty(padded, {num_rows, num_columns});
  if (rows.numel() == 0) return rows;

  const Tensor source = as_contiguous(padded);
  const auto row_bytes = static_cast<size_t>(num_columns) * padded.element_size();
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(rows.mutable_data_ptr());
  torch::stable::parallel_for(
      0, num_rows, grain_rows(num_columns), [&](int64_t begin, int64_t end) {
        int64_t expert = begin < offsets.num_live ? offsets.expert_of(begin) : 0;
        for (int64_t row = begin; row < end; ++row) {
          char* target = to + row * row_bytes;
          bool held = row < offsets.num_live;
          if (held) {
            while (row >= offsets.end(expert)) ++expert;
            held = row - offsets.begin(expert) < capacity;
          }
          if (held) {
            const int64_t slot = expert * capacity + row - offsets.begin(expert);
            std::memcpy(target, from + slot * row_bytes, row_bytes);
          } else {
            std::memset(target, 0, row_bytes);
          }
        }
      });
  return rows;
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("pad_rows", TORCH_BOX(&moeops::cpu::pad_rows));
  m.impl("unpad_rows", TORCH_BOX(&moeops::cpu::unpad_rows));
}
