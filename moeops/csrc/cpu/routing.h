// The choice of one token's experts, shared by the routing ops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "checks/routing.h"
#include "cpu/scores.h"
#include "dispatch.h"

namespace moeops::cpu {

// From here on a partial sort of all experts is cheaper than inserting into the list of the best.
constexpr int64_t kMaxInsertion = 16;

template <typename acc_t>
void compute_scores(bool sigmoid, const acc_t* logits, acc_t* scores, int64_t num_experts) {
  if (sigmoid) {
    sigmoid_row(logits, scores, num_experts);
  } else {
    softmax_row(logits, scores, num_experts);
  }
}

// The top_k ids by falling value, ties by lower id. `order` has room for every expert.
template <typename acc_t>
void select_top(const acc_t* values, int64_t num_experts, int64_t top_k, int32_t* order) {
  if (top_k > kMaxInsertion) {
    std::iota(order, order + num_experts, 0);
    std::partial_sort(order, order + top_k, order + num_experts, [&](int32_t a, int32_t b) {
      return values[a] != values[b] ? values[a] > values[b] : a < b;
    });
    return;
  }
  int64_t held = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    if (held == top_k && values[e] <= values[order[held - 1]]) continue;
    int64_t place = held < top_k ? held++ : held - 1;
    for (; place > 0 && values[e] > values[order[place - 1]]; --place) {
      order[place] = order[place - 1];
    }
    order[place] = e;
  }
}

// Leaves only the experts of the best groups in play; a group is worth its two best experts, or
// with `by_sum` all of them.
template <typename acc_t>
void mask_groups(acc_t* choice, int64_t num_experts, int64_t num_groups, int64_t top_groups,
                 bool by_sum, acc_t* group_worth, int32_t* order) {
  constexpr acc_t kOut = -std::numeric_limits<acc_t>::infinity();
  const int64_t size = num_experts / num_groups;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (by_sum) {
      group_worth[g] = sum_of(choice + g * size, size);
      continue;
    }
    acc_t best = kOut, second = kOut;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      if (choice[e] > best) {
        second = best;
        best = choice[e];
      } else if (choice[e] > second) {
        second = choice[e];
      }
    }
    group_worth[g] = size == 1 ? best : best + second;
  }
  select_top(group_worth, num_groups, top_groups, order);
  std::sort(order, order + top_groups);
  for (int64_t g = 0, next = 0; g < num_groups; ++g) {
    if (next < top_groups && order[next] == g) {
      ++next;
    } else {
      std::fill(choice + g * size, choice + (g + 1) * size, kOut);
    }
  }
}

// Scratch memory of one thread: one value for each expert, or of `order` one number.
template <typename acc_t>
struct RouteScratch {
  acc_t* scores;
  acc_t* choice;
  acc_t* worth;
  int32_t* order;
};

// Replaces the last choice by a sample of the softmax over the experts that the others left:
// the first one at which the cumulated probability exceeds `uniform`.
template <typename acc_t>
void sample_last(const acc_t* z, int64_t num_experts, int64_t top_k, acc_t uniform, acc_t* powers,
                 int32_t* order) {
  std::copy(z, z + num_experts, powers);
  for (int64_t k = 0; k + 1 < top_k; ++k) {
    powers[order[k]] = -std::numeric_limits<acc_t>::infinity();
  }
  const acc_t total = softmax_powers(powers, largest_of(powers, num_experts), powers, num_experts);
  acc_t mass = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (powers[e] == 0) continue;
    mass += powers[e];
    order[top_k - 1] = static_cast<int32_t>(e);  // the last one, should rounding lead past it
    if (mass > uniform * total) return;
  }
}

// Chooses and weighs the experts of one token with finite logits `z`. `uniform`, if there is one,
// samples the last choice. Dropped choices get id -1 and weight 0. Returns whether scratch.scores
// holds the scores of all experts.
template <typename acc_t>
bool route_token(const RouteOptions& options, const acc_t* z, const acc_t* bias,
                 const acc_t* uniform, int64_t num_experts, const RouteScratch<acc_t>& scratch,
                 acc_t* weights, int64_t* ids) {
  const auto [scores, choice, worth, order] = scratch;
  const int64_t top_k = options.top_k;
  // Without bias and with one group at most the choice follows the logits: the scores rise with
  // them, but rounding makes them tie where the logits do not. Only the chosen scores are needed
  // then.
  const bool one_group = options.num_groups > 1 && options.groups_by_sum &&
                         options.top_groups == 1 && !options.sigmoid;
  const bool by_logit = !bias && (options.num_groups == 1 || one_group);
  const bool all_free = by_logit && options.num_groups == 1;
  if (!all_free) {
    compute_scores(options.sigmoid, z, scores, num_experts);
    for (int64_t e = 0; e < num_experts; ++e) choice[e] = scores[e] + (bias ? bias[e] : 0);
    if (options.num_groups > 1) {
      mask_groups(choice, num_experts, options.num_groups, options.top_groups,
                  options.groups_by_sum, worth, order);
    }
    for (int64_t e = 0; by_logit && e < num_experts; ++e) {
      if (choice[e] > -std::numeric_limits<acc_t>::infinity()) choice[e] = z[e];
    }
  }
  select_top(all_free ? z : choice, num_experts, top_k, order);
  const bool limited = options.top_p < 1 || options.min_score > 0;
  // Scores of a group that is far below another one may be zero; renormalised ones are not.
  const bool has_scores = !all_free && (!by_logit || !options.renormalize || limited);
  if (!has_scores) {
    const acc_t top = all_free ? z[order[0]] : largest_of(z, num_experts);
    if (uniform) sample_last(z, num_experts, top_k, *uniform, choice, order);
    // A renormalised softmax may leave out the common divisor, unless its scores are compared.
    acc_t divisor = 1, shift = options.renormalize && !limited ? z[order[0]] : top;
    if (!options.sigmoid && (!options.renormalize || limited)) {
      divisor = softmax_powers(z, top, choice, num_experts);
    }
    for (int64_t k = 0; k < top_k; ++k) {
      const acc_t own = z[order[k]];
      scores[order[k]] = options.sigmoid ? sigmoid(own) : exponential(own - shift) / divisor;
    }
  }
  acc_t sum = 0;
  int64_t kept = 0;
  for (acc_t mass = 0; kept < top_k; ++kept) {
    const acc_t own = scores[order[kept]];
    if (limited && kept > 0 &&
        ((options.top_p < 1 && mass >= static_cast<acc_t>(options.top_p)) ||
         own < static_cast<acc_t>(options.min_score))) {
      break;
    }
    mass += own;
    sum += own;
  }
  if (!options.renormalize) sum = 1;
  sum = std::max(sum, std::numeric_limits<acc_t>::min());
  for (int64_t k = 0; k < top_k; ++k) {
    weights[k] = k < kept ? scores[order[k]] / sum * static_cast<acc_t>(options.scale) : acc_t(0);
    ids[k] = k < kept ? order[k] : -1;
  }
  return has_scores;
}

// The gradient of one token's weights with respect to its logits `z`; pairs with id -1 have none.
// Returns the first choice whose id is out of range, -1 if there is none.
template <typename acc_t>
int64_t route_token_grads(const RouteOptions& options, const acc_t* z, const acc_t* grad_weights,
                          const int64_t* ids, int64_t num_experts, acc_t* scores, acc_t* grad) {
  compute_scores(options.sigmoid, z, scores, num_experts);
  std::fill(grad, grad + num_experts, acc_t(0));
  acc_t sum = 0, dot = 0;
  for (int64_t k = 0; k < options.top_k; ++k) {
    if (ids[k] < -1 || ids[k] >= num_experts) return k;
    if (ids[k] < 0) continue;
    sum += scores[ids[k]];
    dot += grad_weights[k] * scores[ids[k]];
  }
  // weight_k = scale * score_k / sum, where the sum is held at the smallest normal number from
  // below.
  constexpr acc_t kSmallest = std::numeric_limits<acc_t>::min();
  const acc_t factor = static_cast<acc_t>(options.scale);
  const bool sum_moves = options.renormalize && sum >= kSmallest;
  const acc_t divisor = options.renormalize ? std::max(sum, kSmallest) : acc_t(1);
  const acc_t mean = sum_moves ? dot / divisor : acc_t(0);
  for (int64_t k = 0; k < options.top_k; ++k) {
    if (ids[k] >= 0) grad[ids[k]] += factor * (grad_weights[k] - mean) / divisor;
  }
  if (options.sigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) grad[e] *= scores[e] * (1 - scores[e]);
    return -1;
  }
  // Softmax subtracts <grad, scores>, which is zero where the weights were renormalised.
  const acc_t inner = sum_moves ? acc_t(0) : factor * dot / divisor;
  for (int64_t e = 0; e < num_experts; ++e) grad[e] = scores[e] * (grad[e] - inner);
  return -1;
}

// Throws for the first logit of `token` that is not finite.
template <typename scalar_t>
void refuse_logits(const char* op, const scalar_t* logits, int64_t token, int64_t num_experts) {
  using acc_t = accumulate_t<scalar_t>;
  for (int64_t e = 0; e < num_experts; ++e) {
    const acc_t value = static_cast<acc_t>(logits[token * num_experts + e]);
    STD_TORCH_CHECK(std::isfinite(value), op, ": logits must be finite, got ", value, " at [",
                    token, ", ", e, "]. Look for overflow in the router or its input.");
  }
}

// The bias in the accumulate type; minus infinity takes an expert out of the choice, nothing else
// may be infinite.
template <typename acc_t>
std::vector<acc_t> read_bias(const char* op, const Tensor& bias) {
  const Tensor source = as_contiguous(bias);
  std::vector<acc_t> values(source.numel());
  MOEOPS_DISPATCH_FLOAT(source.scalar_type(), "topk_route", [&] {
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    for (size_t e = 0; e < values.size(); ++e) {
      values[e] = static_cast<acc_t>(data[e]);
      STD_TORCH_CHECK(values[e] <= std::numeric_limits<acc_t>::max(), op,
                      ": bias must be finite or -inf, got ", values[e], " at [", e,
                      "]. Look for overflow in its update.");
    }
  });
  return values;
}

}  // namespace moeops::cpu
