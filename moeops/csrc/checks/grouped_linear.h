// The arguments of grouped_linear and of its weight gradient; the values of the offsets are the
// kernels' business.
#pragma once

#include "checks.h"

namespace moeops {

inline void check_grouped_linear(const char* op, const Tensor& rows, const Tensor& weight,
                                 const Tensor& expert_offsets, const std::optional<Tensor>& bias) {
  check_dim(op, "rows", rows, 2);
  check_float(op, "rows", rows);
  check_dim(op, "weight", weight, 3);
  check_same_type(op, "weight", weight, "rows", rows);
  check_same_device(op, "weight", weight, rows);
  check_size(op, "weight", weight, 2, rows.size(1));
  check_offsets(op, expert_offsets, rows);
  check_size(op, "weight", weight, 0, expert_offsets.size(0) - 1);
  if (!bias) return;
  check_dim(op, "bias", *bias, 2);
  check_same_type(op, "bias", *bias, "rows", rows);
  check_same_device(op, "bias", *bias, rows);
  check_size(op, "bias", *bias, 0, weight.size(0));
  check_size(op, "bias", *bias, 1, weight.size(1));
}

inline void check_weight_grad(const char* op, const Tensor& grad, const Tensor& rows,
                              const Tensor& expert_offsets) {
  check_dim(op, "grad", grad, 2);
  check_float(op, "grad", grad);
  check_dim(op, "rows", rows, 2);
  check_same_type(op, "rows", rows, "grad", grad);
  check_same_device(op, "rows", rows, grad);
  check_size(op, "rows", rows, 0, grad.size(0));
  check_offsets(op, expert_offsets, rows);
}

}  // namespace moeops
