// topk_route and its backward on the CPU. One thread owns a range of tokens and works through each
// token's logits in scratch memory of its own.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

// From here on a partial sort of all experts is cheaper than inserting into the list of the best.
constexpr int64_t kMaxInsertion = 16;

enum class Score { kSoftmax, kSigmoid };

Score parse_score(const char* op, const std::string& score) {
  check_score(op, score);
  return score == "softmax" ? Score::kSoftmax : Score::kSigmoid;
}

template <typename acc_t>
void compute_scores(Score score, const acc_t* logits, acc_t* scores, int64_t num_experts) {
  if (score == Score::kSigmoid) {
    for (int64_t e = 0; e < num_experts; ++e) scores[e] = 1 / (1 + std::exp(-logits[e]));
    return;
  }
  const acc_t top = *std::max_element(logits, logits + num_experts);
  acc_t sum = 0;
  for (int64_t e = 0; e < num_experts; ++e) sum += scores[e] = std::exp(logits[e] - top);
  for (int64_t e = 0; e < num_experts; ++e) scores[e] /= sum;
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

// Leaves only the experts of the best groups in play; a group is worth its two best experts.
template <typename acc_t>
void mask_groups(acc_t* choice, int64_t num_experts, int64_t num_groups, int64_t top_groups,
                 acc_t* group_worth, int32_t* order) {
  constexpr acc_t kOut = -std::numeric_limits<acc_t>::infinity();
  const int64_t size = num_experts / num_groups;
  for (int64_t g = 0; g < num_groups; ++g) {
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

struct RouteOptions {
  int64_t top_k;
  Score score;
  bool renormalize;
  double scale;
  int64_t num_groups;
  int64_t top_groups;
};

// Scores of the chosen experts, best first in `order`; a renormalised softmax may leave out the
// common divisor.
template <typename acc_t>
void score_chosen(const RouteOptions& options, const acc_t* logits, int64_t num_experts,
                  const int32_t* order, acc_t* scores) {
  const acc_t top = logits[order[0]];
  acc_t divisor = 1;
  if (options.score == Score::kSoftmax && !options.renormalize) {
    divisor = 0;
    for (int64_t e = 0; e < num_experts; ++e) divisor += std::exp(logits[e] - top);
  }
  for (int64_t k = 0; k < options.top_k; ++k) {
    const acc_t z = logits[order[k]];
    scores[order[k]] =
        options.score == Score::kSigmoid ? 1 / (1 + std::exp(-z)) : std::exp(z - top) / divisor;
  }
}

template <typename scalar_t>
void route_kernel(accumulate_t<scalar_t>* weights, int64_t* ids, const scalar_t* logits,
                  const accumulate_t<scalar_t>* bias, int64_t num_tokens, int64_t num_experts,
                  const RouteOptions& options, FirstError& bad_logit) {
  using acc_t = accumulate_t<scalar_t>;
  const Ranges ranges(num_tokens, grain_rows(num_experts));
  // Per range: logits, scores, choice, worth of groups; and an order of experts.
  std::vector<acc_t> values(ranges.count() * num_experts * 4);
  std::vector<int32_t> orders(ranges.count() * num_experts);
  const acc_t scale = static_cast<acc_t>(options.scale);
  ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    acc_t* z = values.data() + range * num_experts * 4;
    acc_t* scores = z + num_experts;
    acc_t* choice = scores + num_experts;
    acc_t* worth = choice + num_experts;
    int32_t* order = orders.data() + range * num_experts;
    for (int64_t token = begin; token < end; ++token) {
      const scalar_t* source = logits + token * num_experts;
      bool finite = true;
      for (int64_t e = 0; e < num_experts; ++e) {
        z[e] = static_cast<acc_t>(source[e]);
        finite &= std::abs(z[e]) <= std::numeric_limits<acc_t>::max();
      }
      if (!finite) {
        bad_logit.report(token);
        continue;
      }
      // Without bias and groups the choice follows the logits: the scores rise with them, but
      // rounding makes them tie where the logits do not. Only the chosen scores are needed then.
      const bool by_logit = !bias && options.num_groups == 1;
      if (!by_logit) {
        compute_scores(options.score, z, scores, num_experts);
        for (int64_t e = 0; e < num_experts; ++e) choice[e] = scores[e] + (bias ? bias[e] : 0);
        if (options.num_groups > 1) {
          mask_groups(choice, num_experts, options.num_groups, options.top_groups, worth, order);
        }
      }
      select_top(by_logit ? z : choice, num_experts, options.top_k, order);
      if (by_logit) score_chosen(options, z, num_experts, order, scores);
      acc_t sum = 0;
      for (int64_t k = 0; k < options.top_k; ++k) sum += scores[order[k]];
      if (!options.renormalize) sum = 1;
      sum = std::max(sum, std::numeric_limits<acc_t>::min());
      for (int64_t k = 0; k < options.top_k; ++k) {
        weights[token * options.top_k + k] = scores[order[k]] / sum * scale;
        ids[token * options.top_k + k] = order[k];
      }
    }
  });
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

std::tuple<Tensor, Tensor> topk_route(const Tensor& logits, const std::optional<Tensor>& bias,
                                      int64_t top_k, const std::string& score, bool renormalize,
                                      double scale, int64_t num_groups, int64_t top_groups) {
  constexpr const char* kOp = "topk_route";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  check_route_options(kOp, num_experts, top_k, score, num_groups, top_groups);
  const Score parsed = parse_score(kOp, score);
  STD_TORCH_CHECK(num_experts < std::numeric_limits<int32_t>::max(), kOp,
                  ": logits must have fewer than 2^31 columns, got ", num_experts, ".");
  if (bias) {
    check_dim(kOp, "bias", *bias, 1);
    check_float(kOp, "bias", *bias);
    check_same_device(kOp, "bias", *bias, logits);
    check_size(kOp, "bias", *bias, 0, num_experts);
  }

  const Tensor source = as_contiguous(logits);
  Tensor weights =
      torch::stable::new_empty(logits, {num_tokens, top_k}, accumulate_type(logits.scalar_type()));
  Tensor ids = torch::stable::new_empty(logits, {num_tokens, top_k}, ScalarType::Long);
  const RouteOptions options{top_k, parsed, renormalize, scale, num_groups, top_groups};
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    std::vector<acc_t> bias_values;
    if (bias) bias_values = read_bias<acc_t>(kOp, *bias);
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    FirstError bad_logit;
    route_kernel<scalar_t>(static_cast<acc_t*>(weights.mutable_data_ptr()),
                           static_cast<int64_t*>(ids.mutable_data_ptr()), data,
                           bias ? bias_values.data() : nullptr, num_tokens, num_experts, options,
                           bad_logit);
    if (bad_logit.found()) refuse_logits(kOp, data, bad_logit.position(), num_experts);
  });
  return {weights, ids};
}

template <typename scalar_t>
void route_backward_kernel(scalar_t* grad_logits, const accumulate_t<scalar_t>* grad_weights,
                           const scalar_t* logits, const int64_t* ids, int64_t num_tokens,
                           int64_t num_experts, int64_t top_k, Score score, bool renormalize,
                           double scale, FirstError& bad_id) {
  using acc_t = accumulate_t<scalar_t>;
  const Ranges ranges(num_tokens, grain_rows(num_experts));
  // Per range: logits, scores, gradient of the scores.
  std::vector<acc_t> values(ranges.count() * num_experts * 3);
  const acc_t factor = static_cast<acc_t>(scale);
  ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    acc_t* z = values.data() + range * num_experts * 3;
    acc_t* scores = z + num_experts;
    acc_t* grad_scores = scores + num_experts;
    for (int64_t token = begin; token < end; ++token) {
      const acc_t* grad = grad_weights + token * top_k;
      const int64_t* chosen = ids + token * top_k;
      acc_t sum = 0, dot = 0;
      for (int64_t e = 0; e < num_experts; ++e) {
        z[e] = static_cast<acc_t>(logits[token * num_experts + e]);
        grad_scores[e] = 0;
      }
      compute_scores(score, z, scores, num_experts);
      bool valid = true;
      for (int64_t k = 0; k < top_k; ++k) {
        if (chosen[k] < 0 || chosen[k] >= num_experts) {
          bad_id.report(token * top_k + k);
          valid = false;
        } else {
          sum += scores[chosen[k]];
          dot += grad[k] * scores[chosen[k]];
        }
      }
      if (!valid) continue;
      // weight_k = scale * score_k / sum, where the sum is held at the smallest normal number from
      // below.
      constexpr acc_t kSmallest = std::numeric_limits<acc_t>::min();
      const bool sum_moves = renormalize && sum >= kSmallest;
      const acc_t divisor = renormalize ? std::max(sum, kSmallest) : acc_t(1);
      const acc_t mean = sum_moves ? dot / divisor : acc_t(0);
      for (int64_t k = 0; k < top_k; ++k) {
        grad_scores[chosen[k]] += factor * (grad[k] - mean) / divisor;
      }
      scalar_t* target = grad_logits + token * num_experts;
      if (score == Score::kSigmoid) {
        for (int64_t e = 0; e < num_experts; ++e) {
          target[e] = static_cast<scalar_t>(grad_scores[e] * scores[e] * (1 - scores[e]));
        }
        continue;
      }
      // Softmax subtracts <grad_scores, scores>, which is zero where the weights were renormalised.
      const acc_t inner = sum_moves ? acc_t(0) : factor * dot / divisor;
      for (int64_t e = 0; e < num_experts; ++e) {
        target[e] = static_cast<scalar_t>(scores[e] * (grad_scores[e] - inner));
      }
    }
  });
}

Tensor topk_route_backward(const Tensor& grad_topk_weights, const Tensor& logits,
                           const Tensor& topk_ids, const std::string& score, bool renormalize,
                           double scale) {
  constexpr const char* kOp = "topk_route_backward";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  check_dim(kOp, "grad_topk_weights", grad_topk_weights, 2);
  check_dim(kOp, "topk_ids", topk_ids, 2);
  check_type(kOp, "topk_ids", topk_ids, ScalarType::Long, "int64");
  STD_TORCH_CHECK(grad_topk_weights.scalar_type() == accumulate_type(logits.scalar_type()), kOp,
                  ": grad_topk_weights must be float32, or float64 beside float64 logits, got ",
                  grad_topk_weights.scalar_type(), ". Cast it.");
  check_same_device(kOp, "grad_topk_weights", grad_topk_weights, logits);
  check_same_device(kOp, "topk_ids", topk_ids, logits);
  check_size(kOp, "topk_ids", topk_ids, 0, logits.size(0));
  check_size(kOp, "grad_topk_weights", grad_topk_weights, 0, logits.size(0));
  check_size(kOp, "grad_topk_weights", grad_topk_weights, 1, topk_ids.size(1));
  const Score parsed = parse_score(kOp, score);

  const Tensor source = as_contiguous(logits);
  const Tensor grad = as_contiguous(grad_topk_weights);
  const Tensor ids = as_contiguous(topk_ids);
  Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  if (grad_logits.numel() == 0) return grad_logits;
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  FirstError bad_id;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    route_backward_kernel<scalar_t>(
        static_cast<scalar_t*>(grad_logits.mutable_data_ptr()),
        static_cast<const accumulate_t<scalar_t>*>(grad.const_data_ptr()),
        static_cast<const scalar_t*>(source.const_data_ptr()), id_data, logits.size(0),
        logits.size(1), ids.size(1), parsed, renormalize, scale, bad_id);
  });
  STD_TORCH_CHECK(!bad_id.found(), kOp, ": topk_ids must be in [0, ", logits.size(1), "), got ",
                  id_data[bad_id.position()], " at pair ", bad_id.position(),
                  ". Pass the ids that topk_route returned.");
  return grad_logits;
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("topk_route", TORCH_BOX(&moeops::cpu::topk_route));
  m.impl("topk_route_backward", TORCH_BOX(&moeops::cpu::topk_route_backward));
}
