// Per-expert matrix products on the CPU, shared by the grouped_linear ops and moe_mlp. Every
// product is torch's own mm on the rows of one expert; arguments are checked by the caller.
#pragma once

#include <optional>

#include "cpu/plan.h"

namespace moeops::cpu {

// [R, H] = rows @ weight[e].T + bias[e]; weight [E, H, D], any strides; rows past the last offset
// are zero.
Tensor linear_rows(const Tensor& rows, const Tensor& weight, const Offsets& offsets,
                   const std::optional<Tensor>& bias);

// [E, H, D] = grad[rows of e].T @ rows[rows of e].
Tensor linear_weight_grad(const Tensor& grad, const Tensor& rows, const Offsets& offsets);

// [E, D] = sum of the rows of e, each times row_weights[row] where given (accumulate type, [R]).
Tensor sum_by_expert(const Tensor& rows, const Offsets& offsets, const void* row_weights);

}  // namespace moeops::cpu
