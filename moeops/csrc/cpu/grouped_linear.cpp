// grouped_linear, its weight gradient and grouped_sum on the CPU: a loop over experts around
// torch's mm, which is threaded itself; what surrounds the products is threaded here.
#include "cpu/grouped_linear.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "aten.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

// Columns of one grouped_sum task: a cache line or more per row, sums that fit the first cache
// level.
constexpr int64_t kSumColumns = 64;
// Rows summed before the partial sum moves to the total, which keeps float32 sums of many rows
// accurate.
constexpr int64_t kSumRows = 128;

template <typename scalar_t>
void add_bias(scalar_t* out, const scalar_t* bias, const Offsets& offsets, int64_t num_columns) {
  using acc_t = accumulate_t<scalar_t>;
  torch::stable::parallel_for(
      0, offsets.num_live, grain_rows(num_columns), [&](int64_t begin, int64_t end) {
        int64_t expert = offsets.expert_of(begin);
        for (int64_t row = begin; row < end; ++row) {
          while (row >= offsets.end(expert)) ++expert;
          scalar_t* target = out + row * num_columns;
          const scalar_t* source = bias + expert * num_columns;
          for (int64_t i = 0; i < num_columns; ++i) {
            target[i] = static_cast<scalar_t>(static_cast<acc_t>(target[i]) +
                                              static_cast<acc_t>(source[i]));
          }
        }
      });
}

template <typename scalar_t>
void sum_by_expert_kernel(scalar_t* out, const scalar_t* rows,
                          const accumulate_t<scalar_t>* row_weights, const Offsets& offsets,
                          int64_t num_columns) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t blocks = (num_columns + kSumColumns - 1) / kSumColumns;
  torch::stable::parallel_for(0, offsets.num_experts * blocks, 1, [&](int64_t begin, int64_t end) {
    acc_t total[kSumColumns];
    acc_t partial[kSumColumns];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t expert = task / blocks;
      const int64_t column = task % blocks * kSumColumns;
      const int64_t width = std::min(kSumColumns, num_columns - column);
      std::fill(total, total + width, acc_t(0));
      const int64_t last = offsets.end(expert);
      for (int64_t first = offsets.begin(expert); first < last; first += kSumRows) {
        std::fill(partial, partial + width, acc_t(0));
        for (int64_t row = first; row < std::min(last, first + kSumRows); ++row) {
          const scalar_t* source = rows + row * num_columns + column;
          const acc_t weight = row_weights ? row_weights[row] : acc_t(1);
          for (int64_t i = 0; i < width; ++i) {
            partial[i] += weight * static_cast<acc_t>(source[i]);
          }
        }
        for (int64_t i = 0; i < width; ++i) total[i] += partial[i];
      }
      scalar_t* target = out + expert * num_columns + column;
      for (int64_t i = 0; i < width; ++i) target[i] = static_cast<scalar_t>(total[i]);
    }
  });
}

// What mm is given for `t`. torch's float16 mm is a scalar loop on the CPU, 4 to 60 times slower
// than converting to float32 and back (torch 2.13, 4096 x 512 x 512).
Tensor multiplicand(const Tensor& t) {
  return t.scalar_type() == ScalarType::Half ? torch::stable::to(t, ScalarType::Float) : t;
}

// The product in the type of `like`.
Tensor result(const Tensor& product, const Tensor& like) {
  return product.scalar_type() == like.scalar_type()
             ? product
             : torch::stable::to(product, like.scalar_type());
}

// Zeroes rows [first, R) of a contiguous [R, columns].
void clear_rows_from(Tensor& rows, int64_t first) {
  const auto row_bytes = static_cast<size_t>(rows.size(1)) * rows.element_size();
  const auto count = static_cast<size_t>(rows.size(0) - first);
  if (row_bytes == 0 || count == 0) return;
  std::memset(static_cast<char*>(rows.mutable_data_ptr()) + first * row_bytes, 0,
              count * row_bytes);
}

}  // namespace

Tensor linear_rows(const Tensor& rows, const Tensor& weight, const Offsets& offsets,
                   const std::optional<Tensor>& bias) {
  const NoGradGuard no_grad;
  Tensor source = as_contiguous(multiplicand(rows));
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), weight.size(1)}, source.scalar_type());
  if (out.numel() == 0) return result(out, rows);
  for (int64_t e = 0; e < offsets.num_experts; ++e) {
    if (offsets.size(e) == 0) continue;
    Tensor out_rows = torch::stable::narrow(out, 0, offsets.begin(e), offsets.size(e));
    mm_out(out_rows, torch::stable::narrow(source, 0, offsets.begin(e), offsets.size(e)),
           torch::stable::transpose(multiplicand(torch::stable::select(weight, 0, e)), 0, 1));
  }
  clear_rows_from(out, offsets.num_live);
  if (bias && offsets.num_live > 0) {
    const Tensor bias_rows = as_contiguous(multiplicand(*bias));
    MOEOPS_DISPATCH_FLOAT(out.scalar_type(), "grouped_linear", [&] {
      add_bias<scalar_t>(static_cast<scalar_t*>(out.mutable_data_ptr()),
                         static_cast<const scalar_t*>(bias_rows.const_data_ptr()), offsets,
                         out.size(1));
    });
  }
  return result(out, rows);
}

Tensor linear_weight_grad(const Tensor& grad, const Tensor& rows, const Offsets& offsets) {
  const NoGradGuard no_grad;
  Tensor left = as_contiguous(multiplicand(grad));
  Tensor right = as_contiguous(multiplicand(rows));
  Tensor out = torch::stable::new_empty(rows, {offsets.num_experts, grad.size(1), rows.size(1)},
                                        right.scalar_type());
  if (out.numel() == 0) return result(out, rows);
  for (int64_t e = 0; e < offsets.num_experts; ++e) {
    Tensor target = torch::stable::select(out, 0, e);
    if (offsets.size(e) == 0) {
      torch::stable::zero_(target);
      continue;
    }
    mm_out(target,
           torch::stable::transpose(
               torch::stable::narrow(left, 0, offsets.begin(e), offsets.size(e)), 0, 1),
           torch::stable::narrow(right, 0, offsets.begin(e), offsets.size(e)));
  }
  return result(out, rows);
}

Tensor sum_by_expert(const Tensor& rows, const Offsets& offsets, const void* row_weights) {
  const Tensor source = as_contiguous(rows);
  Tensor out = torch::stable::new_empty(rows, {offsets.num_experts, rows.size(1)});
  if (out.numel() == 0) return out;
  MOEOPS_DISPATCH_FLOAT(rows.scalar_type(), "grouped_sum", [&] {
    sum_by_expert_kernel<scalar_t>(static_cast<scalar_t*>(out.mutable_data_ptr()),
                                   static_cast<const scalar_t*>(source.const_data_ptr()),
                                   static_cast<const accumulate_t<scalar_t>*>(row_weights), offsets,
                                   rows.size(1));
  });
  return out;
}

namespace {

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                      const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "grouped_linear";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  check_dim(kOp, "weight", weight, 3);
  check_same_type(kOp, "weight", weight, "rows", rows);
  check_same_device(kOp, "weight", weight, rows);
  check_size(kOp, "weight", weight, 2, rows.size(1));
  const Offsets offsets = read_offsets(kOp, expert_offsets, rows, rows.size(0));
  check_size(kOp, "weight", weight, 0, offsets.num_experts);
  if (bias) {
    check_dim(kOp, "bias", *bias, 2);
    check_same_type(kOp, "bias", *bias, "rows", rows);
    check_same_device(kOp, "bias", *bias, rows);
    check_size(kOp, "bias", *bias, 0, weight.size(0));
    check_size(kOp, "bias", *bias, 1, weight.size(1));
  }
  return linear_rows(rows, weight, offsets, bias);
}

Tensor grouped_linear_weight_grad(const Tensor& grad, const Tensor& rows,
                                  const Tensor& expert_offsets) {
  constexpr const char* kOp = "grouped_linear_weight_grad";
  check_dim(kOp, "grad", grad, 2);
  check_float(kOp, "grad", grad);
  check_dim(kOp, "rows", rows, 2);
  check_same_type(kOp, "rows", rows, "grad", grad);
  check_same_device(kOp, "rows", rows, grad);
  check_size(kOp, "rows", rows, 0, grad.size(0));
  return linear_weight_grad(grad, rows, read_offsets(kOp, expert_offsets, rows, rows.size(0)));
}

Tensor grouped_sum(const Tensor& rows, const Tensor& expert_offsets) {
  constexpr const char* kOp = "grouped_sum";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  return sum_by_expert(rows, read_offsets(kOp, expert_offsets, rows, rows.size(0)), nullptr);
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&moeops::cpu::grouped_linear));
  m.impl("grouped_linear_weight_grad", TORCH_BOX(&moeops::cpu::grouped_linear_weight_grad));
  m.impl("grouped_sum", TORCH_BOX(&moeops::cpu::grouped_sum));
}
