// permute_tokens, unpermute_tokens and the latter's backward on the CPU. One thread owns a range of
// rows (or of tokens) and moves whole rows.
#include "cpu/permute.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace moeops::cpu {

void gather_live_rows(const Tensor& x, const Plan& plan, int64_t first, const Matrix& target) {
  const auto row_bytes = static_cast<size_t>(x.size(1)) * x.element_size();
  if (row_bytes == 0) return;
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  torch::stable::parallel_for(
      0, target.rows, grain_rows(x.size(1)), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t token = plan.row_to_pair[first + row] / plan.top_k;
          std::memcpy(target.data + row * row_bytes, from + token * row_bytes, row_bytes);
        }
      });
}

Tensor gather_rows(const Tensor& x, const Plan& plan) {
  Tensor rows = torch::stable::new_empty(x, {plan.num_rows, x.size(1)});
  const int64_t live = plan.offsets.num_live;
  gather_live_rows(x, plan, 0, row_matrix(rows, 0, live));
  clear(row_matrix(rows, live, plan.num_rows - live));
  return rows;
}

namespace {

// Columns summed at a time: the sums stay in registers and the first cache level.
constexpr int64_t kColumnBlock = 256;

// y [D] = the sum over the `num_kept` slots in `kept` of one token's rows, weighted where there are
// weights.
template <typename scalar_t>
MOEOPS_WIDEST_VECTORS void sum_token(const scalar_t* __restrict rows,
                                     const accumulate_t<scalar_t>* weights,
                                     const int32_t* pair_to_row, const int32_t* kept,
                                     int64_t num_kept, int64_t num_columns,
                                     scalar_t* __restrict y) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t sums[kColumnBlock];
  for (int64_t column = 0; column < num_columns; column += kColumnBlock) {
    const int64_t width = std::min(kColumnBlock, num_columns - column);
    std::fill(sums, sums + width, acc_t(0));
    for (int64_t i = 0; i < num_kept; ++i) {
      const scalar_t* source = rows + pair_to_row[kept[i]] * num_columns + column;
      const acc_t weight = weights ? weights[kept[i]] : acc_t(1);
      for (int64_t c = 0; c < width; ++c) sums[c] += weight * static_cast<acc_t>(source[c]);
    }
    for (int64_t c = 0; c < width; ++c) y[column + c] = static_cast<scalar_t>(sums[c]);
  }
}

template <typename scalar_t>
void sum_rows_kernel(const scalar_t* rows, const accumulate_t<scalar_t>* weights, const Plan& plan,
                     int64_t num_columns, scalar_t* y) {
  const int64_t live = plan.offsets.num_live;
  const int64_t top_k = plan.top_k;
  const int64_t rows_per_token = live / plan.num_tokens + 1;
  const Ranges ranges(plan.num_tokens, grain_rows(num_columns * rows_per_token + top_k));
  std::vector<int32_t> slots(ranges.count() * top_k);
  ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    int32_t* kept = slots.data() + range * top_k;
    for (int64_t token = begin; token < end; ++token) {
      // The slots that hold something, looked for once and not once per column block.
      const int32_t* pair_to_row = plan.pair_to_row + token * top_k;
      int64_t num_kept = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        if (pair_to_row[k] < live) kept[num_kept++] = static_cast<int32_t>(k);
      }
      sum_token(rows, weights ? weights + token * top_k : nullptr, pair_to_row, kept, num_kept,
                num_columns, y + token * num_columns);
    }
  });
}

// Row by row: grad_rows = weight * grad_y, grad_weight = <grad_y, row>. Weights without a live row
// are not written.
template <typename scalar_t>
void unpermute_backward_kernel(const scalar_t* grad_y, const scalar_t* rows,
                               const accumulate_t<scalar_t>* weights, const Plan& plan,
                               int64_t num_columns, scalar_t* grad_rows,
                               accumulate_t<scalar_t>* grad_weights) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t live = plan.offsets.num_live;
  torch::stable::parallel_for(0, plan.num_rows, grain_rows(num_columns),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) {
                                  scalar_t* target = grad_rows + row * num_columns;
                                  if (row >= live) {
                                    std::fill(target, target + num_columns, scalar_t(0));
                                    continue;
                                  }
                                  const int64_t pair = plan.row_to_pair[row];
                                  const scalar_t* grad = grad_y + pair / plan.top_k * num_columns;
                                  const scalar_t* source = rows + row * num_columns;
                                  const acc_t weight = weights[pair];
                                  acc_t dot = 0;
#pragma omp simd reduction(+ : dot)
                                  for (int64_t i = 0; i < num_columns; ++i) {
                                    const acc_t g = static_cast<acc_t>(grad[i]);
                                    dot += g * static_cast<acc_t>(source[i]);
                                    target[i] = static_cast<scalar_t>(weight * g);
                                  }
                                  grad_weights[pair] = dot;
                                }
                              });
}

}  // namespace

Tensor sum_rows(const Tensor& rows, const std::optional<Tensor>& topk_weights, const Plan& plan) {
  const int64_t num_columns = rows.size(1);
  Tensor y = torch::stable::new_empty(rows, {plan.num_tokens, num_columns});
  if (y.numel() == 0) return y;
  std::optional<Tensor> weights;
  if (topk_weights) weights = as_contiguous(*topk_weights);
  MOEOPS_DISPATCH_FLOAT(rows.scalar_type(), "unpermute_tokens", [&] {
    using acc_t = accumulate_t<scalar_t>;
    sum_rows_kernel<scalar_t>(
        static_cast<const scalar_t*>(rows.const_data_ptr()),
        weights ? static_cast<const acc_t*>(weights->const_data_ptr()) : nullptr, plan, num_columns,
        static_cast<scalar_t*>(y.mutable_data_ptr()));
  });
  return y;
}

namespace {

Tensor permute_tokens(const Tensor& x, const Tensor& row_to_pair, const Tensor& pair_to_row,
                      const Tensor& expert_offsets) {
  constexpr const char* kOp = "permute_tokens";
  check_dim(kOp, "x", x, 2);
  check_float(kOp, "x", x);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  check_size(kOp, "x", x, 0, plan.num_tokens);
  return gather_rows(as_contiguous(x), plan);
}

Tensor unpermute_tokens(const Tensor& rows, const Tensor& row_to_pair, const Tensor& pair_to_row,
                        const Tensor& expert_offsets, const std::optional<Tensor>& topk_weights) {
  constexpr const char* kOp = "unpermute_tokens";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, rows);
  check_size(kOp, "rows", rows, 0, plan.num_rows);
  if (topk_weights) check_topk_weights(kOp, *topk_weights, rows.scalar_type(), pair_to_row);
  return sum_rows(as_contiguous(rows), topk_weights, plan);
}

std::tuple<Tensor, Tensor> unpermute_tokens_backward(const Tensor& grad_y, const Tensor& rows,
                                                     const Tensor& row_to_pair,
                                                     const Tensor& pair_to_row,
                                                     const Tensor& expert_offsets,
                                                     const Tensor& topk_weights) {
  constexpr const char* kOp = "unpermute_tokens_backward";
  check_dim(kOp, "grad_y", grad_y, 2);
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  check_same_type(kOp, "grad_y", grad_y, "rows", rows);
  check_same_device(kOp, "grad_y", grad_y, rows);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, rows);
  check_size(kOp, "rows", rows, 0, plan.num_rows);
  check_size(kOp, "grad_y", grad_y, 0, plan.num_tokens);
  check_size(kOp, "grad_y", grad_y, 1, rows.size(1));
  check_topk_weights(kOp, topk_weights, rows.scalar_type(), pair_to_row);

  const Tensor grad_y_rows = as_contiguous(grad_y);
  const Tensor source_rows = as_contiguous(rows);
  const Tensor weights = as_contiguous(topk_weights);
  Tensor grad_rows = torch::stable::new_empty(rows, rows.sizes());
  Tensor grad_weights = torch::stable::new_zeros(weights, weights.sizes());
  if (plan.num_rows == 0) return {grad_rows, grad_weights};
  MOEOPS_DISPATCH_FLOAT(rows.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    unpermute_backward_kernel<scalar_t>(static_cast<const scalar_t*>(grad_y_rows.const_data_ptr()),
                                        static_cast<const scalar_t*>(source_rows.const_data_ptr()),
                                        static_cast<const acc_t*>(weights.const_data_ptr()), plan,
                                        rows.size(1),
                                        static_cast<scalar_t*>(grad_rows.mutable_data_ptr()),
                                        static_cast<acc_t*>(grad_weights.mutable_data_ptr()));
  });
  return {grad_rows, grad_weights};
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("permute_tokens", TORCH_BOX(&moeops::cpu::permute_tokens));
  m.impl("unpermute_tokens", TORCH_BOX(&moeops::cpu::unpermute_tokens));
  m.impl("unpermute_tokens_backward", TORCH_BOX(&moeops::cpu::unpermute_tokens_backward));
}
