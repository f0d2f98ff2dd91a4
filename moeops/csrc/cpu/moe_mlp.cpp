// The expert block on the CPU: permute, up projection, activation, down projection, weighted sum,
// and its backward. The output rows are not kept for the backward: with dA = dY @ w_down[e] the
// gradient of a routing weight is <dA, a> + <dY, b_down[e]>, so the hidden rows, recomputed from
// the pre-activation, are enough.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "aten.h"
#include "cpu/activation.h"
#include "cpu/grouped_linear.h"
#include "cpu/permute.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

// Columns of one row worked on at a time: four blocks of this many float64 take half of a
// first-level cache.
constexpr int64_t kColumnBlock = 512;

// Calls body(activation, gated) with the activation's functions and whether rows hold a gate before
// the up half.
template <typename Body>
void with_activation(const char* op, const std::string& name, const Body& body) {
  if (name == "swiglu") return body(Silu{}, std::true_type{});
  if (name == "gelu") return body(Gelu{}, std::false_type{});
  if (name == "relu") return body(Relu{}, std::false_type{});
  if (name == "silu") return body(Silu{}, std::false_type{});
  if (name == "relu_squared") return body(ReluSquared{}, std::false_type{});
  STD_TORCH_CHECK(false, op, ": activation must be swiglu, gelu, relu, silu or relu_squared, got '",
                  name, "'. Pick one of them.");
}

template <typename Activation, typename Gated, typename scalar_t>
MOEOPS_WIDEST_VECTORS void activate_row(Activation, Gated, scalar_t* __restrict hidden,
                                        const scalar_t* __restrict pre, int64_t width) {
  using acc_t = accumulate_t<scalar_t>;
  for (int64_t i = 0; i < width; ++i) {
    acc_t a = Activation::value(static_cast<acc_t>(pre[i]));
    if constexpr (Gated::value) a *= static_cast<acc_t>(pre[width + i]);
    hidden[i] = static_cast<scalar_t>(a);
  }
}

// hidden [R, H] = act(pre_activation), live rows only.
template <typename Activation, typename Gated, typename scalar_t>
void activate_kernel(Activation act, Gated gated, scalar_t* hidden, const scalar_t* pre,
                     int64_t num_live, int64_t width) {
  torch::stable::parallel_for(0, num_live, grain_rows(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      activate_row(act, gated, hidden + row * width, pre + row * width * (Gated::value ? 2 : 1),
                   width);
    }
  });
}

// Pointers of activate_backward_kernel; null where a result is not needed or a bias absent.
template <typename scalar_t>
struct BackwardRows {
  scalar_t* grad_pre;                     // [R, 2H or H]
  scalar_t* weighted_hidden;              // [R, H]
  accumulate_t<scalar_t>* grad_weights;   // [T, K]
  accumulate_t<scalar_t>* row_weights;    // [R], the routing weight of each live row
  const scalar_t* pre;                    // [R, 2H or H]
  const scalar_t* grad_hidden;            // [R, H]; null if nothing needs it
  const accumulate_t<scalar_t>* weights;  // [T, K]
  const scalar_t* grad_out;               // [R, D_out], unweighted
  const scalar_t* b_down;                 // [E, D_out]
  int64_t width;                          // H
  int64_t out_width;                      // D_out
};

// The columns of `row` from `first` on, at most kColumnBlock; returns their part of the weight's
// gradient. Short loops over what stays in the first cache level: each becomes vector code.
template <typename Activation, typename Gated, typename scalar_t>
MOEOPS_WIDEST_VECTORS accumulate_t<scalar_t> activate_backward_block(
    Activation, Gated, const BackwardRows<scalar_t>& p, int64_t row, accumulate_t<scalar_t> weight,
    int64_t first) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kGated = Gated::value;
  const int64_t width = p.width;
  const int64_t count = std::min(kColumnBlock, width - first);
  const scalar_t* pre = p.pre + row * width * (kGated ? 2 : 1) + first;
  acc_t value[kColumnBlock], slope[kColumnBlock], up[kColumnBlock], grad[kColumnBlock];
  for (int64_t i = 0; i < count; ++i) {
    const acc_t x = static_cast<acc_t>(pre[i]);
    value[i] = Activation::value(x);
    slope[i] = Activation::slope(x);
    if constexpr (kGated) up[i] = static_cast<acc_t>(pre[width + i]);
  }
  if (p.weighted_hidden) {
    scalar_t* hidden = p.weighted_hidden + row * width + first;
    for (int64_t i = 0; i < count; ++i) {
      hidden[i] = static_cast<scalar_t>(weight * (kGated ? value[i] * up[i] : value[i]));
    }
  }
  acc_t dot = 0;
  if (!p.grad_hidden) return dot;
  const scalar_t* grad_hidden = p.grad_hidden + row * width + first;
  for (int64_t i = 0; i < count; ++i) grad[i] = static_cast<acc_t>(grad_hidden[i]);
  if (p.grad_weights) {
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < count; ++i) {
      dot += grad[i] * (kGated ? value[i] * up[i] : value[i]);
    }
  }
  if (p.grad_pre) {
    scalar_t* grad_pre = p.grad_pre + row * width * (kGated ? 2 : 1) + first;
    for (int64_t i = 0; i < count; ++i) {
      const acc_t g = weight * grad[i];
      grad_pre[i] = static_cast<scalar_t>(g * slope[i] * (kGated ? up[i] : acc_t(1)));
      if constexpr (kGated) grad_pre[width + i] = static_cast<scalar_t>(g * value[i]);
    }
  }
  return dot;
}

// One pass over a row's pre-activation and hidden gradient writes everything that depends on
// either.
template <typename Activation, typename Gated, typename scalar_t>
void activate_backward_kernel(Activation act, Gated gated, const BackwardRows<scalar_t>& p,
                              const Plan& plan) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t live = plan.offsets.num_live;
  const int64_t width = p.width;
  torch::stable::parallel_for(0, live, grain_rows(width), [&](int64_t begin, int64_t end) {
    int64_t expert = plan.offsets.expert_of(begin);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pair = plan.row_to_pair[row];
      while (row >= plan.offsets.end(expert)) ++expert;
      const acc_t weight = p.weights[pair];
      if (p.row_weights) p.row_weights[row] = weight;
      acc_t dot = 0;
      for (int64_t first = 0; first < width; first += kColumnBlock) {
        dot += activate_backward_block(act, gated, p, row, weight, first);
      }
      if (p.grad_weights) {
        if (p.b_down) {
          const scalar_t* grad_out = p.grad_out + row * p.out_width;
          const scalar_t* bias = p.b_down + expert * p.out_width;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < p.out_width; ++i) {
            dot += static_cast<acc_t>(grad_out[i]) * static_cast<acc_t>(bias[i]);
          }
        }
        p.grad_weights[pair] = dot;
      }
    }
  });
}

// Checks what the forward and the backward have in common; returns H.
int64_t check_block(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& w_up,
                    const Tensor& w_down, const std::optional<Tensor>& b_up,
                    const std::optional<Tensor>& b_down, const Plan& plan,
                    const Tensor& pair_to_row, const std::string& activation) {
  check_size(op, "x", x, 0, plan.num_tokens);
  check_topk_weights(op, topk_weights, x.scalar_type(), pair_to_row);
  for (const auto& [name, weight] : {std::pair("w_up", &w_up), std::pair("w_down", &w_down)}) {
    check_dim(op, name, *weight, 3);
    check_same_type(op, name, *weight, "x", x);
    check_same_device(op, name, *weight, x);
    check_size(op, name, *weight, 0, plan.offsets.num_experts);
  }
  check_size(op, "w_up", w_up, 2, x.size(1));
  const int64_t width = w_down.size(2);
  with_activation(op, activation, [&](auto, auto gated) {
    check_size(op, "w_up", w_up, 1, gated() ? 2 * width : width);
  });
  for (const auto& [name, bias, weight] :
       {std::tuple("b_up", &b_up, &w_up), std::tuple("b_down", &b_down, &w_down)}) {
    if (!*bias) continue;
    check_dim(op, name, **bias, 2);
    check_same_type(op, name, **bias, "x", x);
    check_same_device(op, name, **bias, x);
    check_size(op, name, **bias, 0, plan.offsets.num_experts);
    check_size(op, name, **bias, 1, weight->size(1));
  }
  return width;
}

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& topk_weights, const Tensor& w_up,
                                   const Tensor& w_down, const std::optional<Tensor>& b_up,
                                   const std::optional<Tensor>& b_down, const Tensor& row_to_pair,
                                   const Tensor& pair_to_row, const Tensor& expert_offsets,
                                   const std::string& activation, bool keep_pre) {
  constexpr const char* kOp = "moe_mlp";
  const NoGradGuard no_grad;
  check_dim(kOp, "x", x, 2);
  check_float(kOp, "x", x);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  const int64_t width =
      check_block(kOp, x, topk_weights, w_up, w_down, b_up, b_down, plan, pair_to_row, activation);

  Tensor pre = linear_rows(gather_rows(as_contiguous(x), plan), w_up, plan.offsets, b_up);
  Tensor hidden = torch::stable::new_empty(x, {plan.num_rows, width});
  MOEOPS_DISPATCH_FLOAT(x.scalar_type(), "moe_mlp", [&] {
    with_activation(kOp, activation, [&](auto functions, auto gated) {
      activate_kernel(functions, gated, static_cast<scalar_t*>(hidden.mutable_data_ptr()),
                      static_cast<const scalar_t*>(pre.const_data_ptr()), plan.offsets.num_live,
                      width);
    });
  });
  if (!keep_pre) pre = torch::stable::new_empty(x, {0, w_up.size(1)});
  const Tensor out = linear_rows(hidden, w_down, plan.offsets, b_down);
  return {sum_rows(out, topk_weights, plan), pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& topk_weights, const Tensor& w_up,
    const Tensor& w_down, const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_down,
    const Tensor& pre_activation, const Tensor& row_to_pair, const Tensor& pair_to_row,
    const Tensor& expert_offsets, const std::string& activation, bool need_x,
    bool need_topk_weights, bool need_w_up, bool need_w_down) {
  constexpr const char* kOp = "moe_mlp_backward";
  const NoGradGuard no_grad;
  check_dim(kOp, "x", x, 2);
  check_float(kOp, "x", x);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  const int64_t width =
      check_block(kOp, x, topk_weights, w_up, w_down, b_up, b_down, plan, pair_to_row, activation);
  const int64_t num_rows = plan.num_rows, out_width = w_down.size(1);
  for (const auto& [name, tensor] :
       {std::pair("grad_y", &grad_y), std::pair("pre_activation", &pre_activation)}) {
    check_dim(kOp, name, *tensor, 2);
    check_same_type(kOp, name, *tensor, "x", x);
    check_same_device(kOp, name, *tensor, x);
  }
  check_size(kOp, "grad_y", grad_y, 0, plan.num_tokens);
  check_size(kOp, "grad_y", grad_y, 1, out_width);
  check_size(kOp, "pre_activation", pre_activation, 0, num_rows);
  check_size(kOp, "pre_activation", pre_activation, 1, w_up.size(1));

  const bool need_pre = need_x || need_w_up;
  const Tensor pre = as_contiguous(pre_activation);
  const Tensor weights = as_contiguous(topk_weights);
  std::optional<Tensor> bias;
  if (b_down) bias = as_contiguous(*b_down);
  const auto empty = [&](bool needed, const Tensor& like, std::initializer_list<int64_t> size) {
    return needed ? torch::stable::new_empty(like, size) : torch::stable::new_empty(x, {0});
  };

  const Tensor grad_out = gather_rows(as_contiguous(grad_y), plan);  // [R, D_out]
  std::optional<Tensor> grad_hidden;                                 // [R, H]
  if (need_pre || need_topk_weights) {
    grad_hidden =
        linear_rows(grad_out, torch::stable::transpose(w_down, 1, 2), plan.offsets, std::nullopt);
  }
  Tensor grad_pre = empty(need_pre, x, {num_rows, w_up.size(1)});
  Tensor weighted_hidden = empty(need_w_down, x, {num_rows, width});
  // Pairs without a live row keep the zero.
  Tensor grad_weights = need_topk_weights
                            ? torch::stable::new_zeros(weights, {plan.num_tokens, plan.top_k})
                            : empty(false, x, {});
  const bool need_b_down = need_w_down && b_down.has_value();
  Tensor row_weights = empty(need_b_down, weights, {num_rows});
  const auto out = [](bool needed, Tensor& t) { return needed ? t.mutable_data_ptr() : nullptr; };
  MOEOPS_DISPATCH_FLOAT(x.scalar_type(), "moe_mlp_backward", [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto in = [](const Tensor& t) {
      return static_cast<const scalar_t*>(t.const_data_ptr());
    };
    BackwardRows<scalar_t> p;
    p.grad_pre = static_cast<scalar_t*>(out(need_pre, grad_pre));
    p.weighted_hidden = static_cast<scalar_t*>(out(need_w_down, weighted_hidden));
    p.grad_weights = static_cast<acc_t*>(out(need_topk_weights, grad_weights));
    p.row_weights = static_cast<acc_t*>(out(need_b_down, row_weights));
    p.pre = in(pre);
    p.grad_hidden = grad_hidden ? in(*grad_hidden) : nullptr;
    p.weights = static_cast<const acc_t*>(weights.const_data_ptr());
    p.grad_out = in(grad_out);
    p.b_down = bias ? in(*bias) : nullptr;
    p.width = width;
    p.out_width = out_width;
    with_activation(kOp, activation, [&](auto functions, auto gated) {
      activate_backward_kernel(functions, gated, p, plan);
    });
  });

  Tensor grad_x = empty(false, x, {});
  if (need_x) {
    const Tensor grad_rows =
        linear_rows(grad_pre, torch::stable::transpose(w_up, 1, 2), plan.offsets, std::nullopt);
    grad_x = sum_rows(grad_rows, std::nullopt, plan);
  }
  Tensor grad_w_up = empty(false, x, {}), grad_b_up = empty(false, x, {});
  if (need_w_up) {
    grad_w_up = linear_weight_grad(grad_pre, gather_rows(as_contiguous(x), plan), plan.offsets);
    if (b_up) grad_b_up = sum_by_expert(grad_pre, plan.offsets, nullptr);
  }
  Tensor grad_w_down = empty(false, x, {}), grad_b_down = empty(false, x, {});
  if (need_w_down) {
    grad_w_down = linear_weight_grad(grad_out, weighted_hidden, plan.offsets);
    if (b_down) grad_b_down = sum_by_expert(grad_out, plan.offsets, row_weights.const_data_ptr());
  }
  return {grad_x, grad_weights, grad_w_up, grad_w_down, grad_b_up, grad_b_down};
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&moeops::cpu::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&moeops::cpu::moe_mlp_backward));
}
