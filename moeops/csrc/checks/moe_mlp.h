// The arguments of moe_mlp and its backward.
#pragma once

#include "activation_options.h"
#include "checks.h"

namespace moeops {

inline void check_activation(const char* op, const ActivationOptions& options) {
  const std::string& name = options.name;
  STD_TORCH_CHECK(
      options.gated() || name == "gelu" || name == "relu" || name == "silu" ||
          name == "relu_squared",
      op, ": activation must be swiglu, geglu_tanh, gelu, relu, silu or relu_squared, got '", name,
      "'. Pick one of them.");
  STD_TORCH_CHECK(name == "swiglu" || options.alpha == 1, op, ": alpha must be 1 with ", name,
                  ", got ", options.alpha, ". Leave it out.");
  STD_TORCH_CHECK(!options.limit || *options.limit > 0, op, ": limit must be above 0, got ",
                  options.limit.value_or(0), ". Leave it out for no limit.");
  STD_TORCH_CHECK(
      options.gated() || (!options.limit && options.offset == 0 && !options.interleaved), op,
      ": limit, offset and interleaved must be left out with ", name,
      ", which has no gate, got one of them. Leave them out.");
}

// What the forward and the backward have in common; the values of the plan are the kernels'
// business.
inline void check_moe_mlp(const char* op, const Tensor& x, const Tensor& topk_weights,
                          const Tensor& w_up, const Tensor& w_down,
                          const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_down,
                          const Tensor& row_to_pair, const Tensor& pair_to_row,
                          const Tensor& expert_offsets, const ActivationOptions& activation) {
  check_dim(op, "x", x, 2);
  check_float(op, "x", x);
  check_plan(op, row_to_pair, pair_to_row, expert_offsets, x);
  check_size(op, "x", x, 0, pair_to_row.size(0));
  check_topk_weights(op, topk_weights, x.scalar_type(), pair_to_row);
  const int64_t num_experts = expert_offsets.size(0) - 1;
  const auto check_like_x = [&](const char* name, const Tensor& t, int64_t dim) {
    check_dim(op, name, t, dim);
    check_same_type(op, name, t, "x", x);
    check_same_device(op, name, t, x);
    check_size(op, name, t, 0, num_experts);
  };
  check_like_x("w_up", w_up, 3);
  check_like_x("w_down", w_down, 3);
  check_activation(op, activation);
  const int64_t hidden_width = w_down.size(2);
  check_size(op, "w_up", w_up, 1, activation.gated() ? 2 * hidden_width : hidden_width);
  check_size(op, "w_up", w_up, 2, x.size(1));
  if (b_up) {
    check_like_x("b_up", *b_up, 2);
    check_size(op, "b_up", *b_up, 1, w_up.size(1));
  }
  if (b_down) {
    check_like_x("b_down", *b_down, 2);
    check_size(op, "b_down", *b_down, 1, w_down.size(1));
  }
}

// Rows of a buffer that belongs to x.
inline void check_rows_like_x(const char* op, const char* name, const Tensor& t, const Tensor& x,
                              int64_t rows) {
  check_dim(op, name, t, 2);
  check_same_type(op, name, t, "x", x);
  check_same_device(op, name, t, x);
  check_size(op, name, t, 0, rows);
}

// What moe_mlp_backward_data takes besides.
inline void check_moe_mlp_grads(const char* op, const Tensor& grad_y, const Tensor& pre_activation,
                                const Tensor& x, const Tensor& w_up, const Tensor& w_down,
                                const Tensor& row_to_pair) {
  check_rows_like_x(op, "grad_y", grad_y, x, x.size(0));
  check_size(op, "grad_y", grad_y, 1, w_down.size(1));
  check_rows_like_x(op, "pre_activation", pre_activation, x, row_to_pair.size(0));
  check_size(op, "pre_activation", pre_activation, 1, w_up.size(1));
}

// The arguments of moe_mlp_backward_weights; what no gradient needs may be anything.
inline void check_moe_mlp_weight_grads(const char* op, const Tensor& grad_y, const Tensor& x,
                                       const Tensor& row_to_pair, const Tensor& pair_to_row,
                                       const Tensor& expert_offsets, const Tensor& topk_weights,
                                       const Tensor& grad_pre, const Tensor& weighted_hidden,
                                       bool need_grad_pre, bool need_weighted_hidden) {
  check_dim(op, "x", x, 2);
  check_float(op, "x", x);
  check_plan(op, row_to_pair, pair_to_row, expert_offsets, x);
  check_size(op, "x", x, 0, pair_to_row.size(0));
  check_topk_weights(op, topk_weights, x.scalar_type(), pair_to_row);
  check_rows_like_x(op, "grad_y", grad_y, x, x.size(0));
  const int64_t num_rows = row_to_pair.size(0);
  if (need_grad_pre) check_rows_like_x(op, "grad_pre", grad_pre, x, num_rows);
  if (need_weighted_hidden) check_rows_like_x(op, "weighted_hidden", weighted_hidden, x, num_rows);
}

}  // namespace moeops
