// Gathers and weighted sums by a TokenPlan, shared by the permute ops and moe_mlp.
#pragma once

#include <optional>

#include "cpu/plan.h"
#include "cpu/products.h"

namespace moeops::cpu {

// rows [R, D] = x[row_to_pair // K], zero behind the live rows; x [T, D] contiguous.
Tensor gather_rows(const Tensor& x, const Plan& plan);

// target [n, D] = the rows of x that rows [first, first + n) of the plan, all live, name.
void gather_live_rows(const Tensor& x, const Plan& plan, int64_t first, const Matrix& target);

// y [T, D] = sum over k of topk_weights * rows[pair_to_row]; rows contiguous, only live rows are
// read.
Tensor sum_rows(const Tensor& rows, const std::optional<Tensor>& topk_weights, const Plan& plan);

}  // namespace moeops::cpu
