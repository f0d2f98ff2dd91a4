// Gathers and weighted sums by a TokenPlan, shared by the permute ops and moe_mlp.
#pragma once

#include <optional>

#include "cpu/plan.h"

namespace moeops::cpu {

// rows [R, D] = x[row_to_pair // K], zero behind the live rows; x [T, D] contiguous.
Tensor gather_rows(const Tensor& x, const Plan& plan);

// y [T, D] = sum over k of topk_weights * rows[pair_to_row]; rows contiguous, only live rows are
// read.
Tensor sum_rows(const Tensor& rows, const std::optional<Tensor>& topk_weights, const Plan& plan);

// topk_weights is [T, K] in the accumulate type of `type`.
void check_topk_weights(const char* op, const Tensor& topk_weights, ScalarType type,
                        const Tensor& pair_to_row);

}  // namespace moeops::cpu
