// noisy_topk_route and its backward on the CPU. One thread owns a range of tokens, in chunks of a
// fixed number so that sums do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/routing.h"
#include "cpu/scores.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

// The numbers of one token: its logits, and one value of each kind for every expert.
template <typename acc_t>
struct NoisyToken {
  acc_t* clean;
  acc_t* noisy;
  acc_t* noise;
  acc_t* sigma;
  acc_t* marks;  // what an expert's noisy logit has to exceed to be chosen

  static constexpr int64_t kKinds = 5;
  NoisyToken(acc_t* scratch, int64_t num_experts)
      : clean(scratch),
        noisy(scratch + num_experts),
        noise(scratch + 2 * num_experts),
        sigma(scratch + 3 * num_experts),
        marks(scratch + 4 * num_experts) {}

  // The last chosen logit for the experts that were left out, the first that was left out for the
  // others.
  void set_marks(const acc_t let_in, const acc_t left_out, int64_t num_experts) {
    std::fill(marks, marks + num_experts, let_in);
    left_out_ = left_out;
  }
  template <typename id_t>
  void mark_chosen(const id_t* ids, int64_t top_k) {
    for (int64_t k = 0; k < top_k; ++k) marks[ids[k]] = left_out_;
  }

 private:
  acc_t left_out_ = 0;
};

// Fills all but the marks; whether all noisy logits are finite.
template <typename scalar_t>
MOEOPS_WIDEST_VECTORS bool load_token(const NoisyToken<accumulate_t<scalar_t>>& token,
                                      const scalar_t* __restrict clean_row,
                                      const scalar_t* __restrict spread_row,
                                      const scalar_t* __restrict noise_row, int64_t num_experts,
                                      accumulate_t<scalar_t> min_noise) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t* __restrict clean = token.clean;
  acc_t* __restrict noisy = token.noisy;
  acc_t* __restrict noise = token.noise;
  acc_t* __restrict sigma = token.sigma;
  int32_t bad = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    clean[e] = static_cast<acc_t>(clean_row[e]);
    noise[e] = static_cast<acc_t>(noise_row[e]);
    sigma[e] = softplus(static_cast<acc_t>(spread_row[e])) + min_noise;
    noisy[e] = clean[e] + noise[e] * sigma[e];
    bad |= !(std::abs(noisy[e]) <= std::numeric_limits<acc_t>::max());
  }
  return bad == 0;
}

// Adds to each expert's load the probability that fresh noise lets the token choose it.
template <typename acc_t>
MOEOPS_WIDEST_VECTORS void add_loads(const NoisyToken<acc_t>& token, acc_t* __restrict loads,
                                     int64_t num_experts) {
  const acc_t* __restrict clean = token.clean;
  const acc_t* __restrict sigma = token.sigma;
  const acc_t* __restrict marks = token.marks;
  for (int64_t e = 0; e < num_experts; ++e) {
    loads[e] += normal_cdf((clean[e] - marks[e]) / sigma[e]);
  }
}

// How fast the load rises with each clean logit, times the load's gradient, and the distance of the
// logit to its mark in units of the noise.
template <typename acc_t>
MOEOPS_WIDEST_VECTORS void load_rises(const NoisyToken<acc_t>& token,
                                      const acc_t* __restrict over_load, acc_t* __restrict rises,
                                      acc_t* __restrict distances, int64_t num_experts) {
  const acc_t* __restrict clean = token.clean;
  const acc_t* __restrict sigma = token.sigma;
  const acc_t* __restrict marks = token.marks;
  for (int64_t e = 0; e < num_experts; ++e) {
    distances[e] = (clean[e] - marks[e]) / sigma[e];
    rises[e] = over_load[e] * normal_density(distances[e]) / sigma[e];
  }
}

// Both gradients of a token from those of its noisy logits and from the load's own rises.
template <typename scalar_t>
MOEOPS_WIDEST_VECTORS void store_gradients(const NoisyToken<accumulate_t<scalar_t>>& token,
                                           const scalar_t* __restrict spread_row,
                                           const accumulate_t<scalar_t>* __restrict grad,
                                           const accumulate_t<scalar_t>* __restrict rises,
                                           const accumulate_t<scalar_t>* __restrict distances,
                                           int64_t num_experts, scalar_t* __restrict grad_clean,
                                           scalar_t* __restrict grad_spread) {
  using acc_t = accumulate_t<scalar_t>;
  const acc_t* __restrict noise = token.noise;
  for (int64_t e = 0; e < num_experts; ++e) {
    const acc_t logistic = sigmoid(static_cast<acc_t>(spread_row[e]));
    grad_clean[e] = static_cast<scalar_t>(rises[e] + grad[e]);
    grad_spread[e] =
        static_cast<scalar_t>((grad[e] * noise[e] - rises[e] * distances[e]) * logistic);
  }
}

// How much the squared coefficient of variation rises with a value: offset + slope * value.
struct Variation {
  double squared;  // var / (mean^2 + tiny)
  double offset, slope;
};

template <typename acc_t>
Variation variation(const acc_t* values, int64_t count) {
  constexpr double kTiny = 1e-30;
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < count; ++i) mean += values[i];
  mean /= count;
  for (int64_t i = 0; i < count; ++i) variance += (values[i] - mean) * (values[i] - mean);
  variance /= count;
  const double divisor = mean * mean + kTiny;
  const double slope = 2 / (count * divisor);
  return {variance / divisor, -slope * mean - 2 * mean / count * variance / (divisor * divisor),
          slope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> noisy_topk_route(const Tensor& clean,
                                                                            const Tensor& spread,
                                                                            const Tensor& noise,
                                                                            int64_t top_k,
                                                                            double min_noise) {
  constexpr const char* kOp = "noisy_topk_route";
  check_noisy(kOp, clean, spread, noise, min_noise);
  check_route_options(kOp, clean.size(1), top_k, "softmax", 1, 1);
  const int64_t num_tokens = clean.size(0), num_experts = clean.size(1);
  const ScalarType acc = accumulate_type(clean.scalar_type());
  const Tensor z = as_contiguous(clean), s = as_contiguous(spread), n = as_contiguous(noise);
  Tensor weights = torch::stable::new_empty(clean, {num_tokens, top_k}, acc);
  Tensor importance = torch::stable::new_empty(clean, {num_experts}, acc);
  Tensor load = torch::stable::new_empty(clean, {num_experts}, acc);
  Tensor loss = torch::stable::new_empty(clean, {}, acc);
  Tensor ids = torch::stable::new_empty(clean, {num_tokens, top_k}, ScalarType::Long);
  Tensor runner_up = torch::stable::new_empty(clean, {num_tokens}, ScalarType::Long);
  MOEOPS_DISPATCH_FLOAT(clean.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* clean_data = static_cast<const scalar_t*>(z.const_data_ptr());
    const auto* spread_data = static_cast<const scalar_t*>(s.const_data_ptr());
    const auto* noise_data = static_cast<const scalar_t*>(n.const_data_ptr());
    auto* weight_data = static_cast<acc_t*>(weights.mutable_data_ptr());
    auto* id_data = static_cast<int64_t*>(ids.mutable_data_ptr());
    auto* next_data = static_cast<int64_t*>(runner_up.mutable_data_ptr());
    const int64_t ranks = std::min(top_k + 1, num_experts);
    const int64_t num_chunks = (num_tokens + kTokensPerSum - 1) / kTokensPerSum;
    const Ranges ranges(num_chunks, grain_rows(kTokensPerSum * num_experts));
    constexpr int64_t kKinds = NoisyToken<acc_t>::kKinds;
    std::vector<acc_t> partial(num_chunks * 2 * num_experts, acc_t(0));
    std::vector<acc_t> values(ranges.count() * kKinds * num_experts);
    std::vector<int32_t> orders(ranges.count() * num_experts);
    FirstError bad_logit;
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      NoisyToken<acc_t> token(values.data() + range * kKinds * num_experts, num_experts);
      int32_t* order = orders.data() + range * num_experts;
      for (int64_t t = begin * kTokensPerSum; t < std::min(num_tokens, end * kTokensPerSum); ++t) {
        const int64_t row = t * num_experts;
        if (!load_token(token, clean_data + row, spread_data + row, noise_data + row, num_experts,
                        static_cast<acc_t>(min_noise))) {
          bad_logit.report(t);
          continue;
        }
        select_top(token.noisy, num_experts, ranks, order);
        acc_t* sums = partial.data() + t / kTokensPerSum * 2 * num_experts;
        acc_t* loads = sums + num_experts;
        const acc_t top = token.noisy[order[0]], let_in = token.noisy[order[top_k - 1]];
        acc_t total = 0;
        for (int64_t k = 0; k < top_k; ++k) total += exponential(token.noisy[order[k]] - top);
        for (int64_t k = 0; k < top_k; ++k) {
          const acc_t weight = exponential(token.noisy[order[k]] - top) / total;
          weight_data[t * top_k + k] = weight;
          id_data[t * top_k + k] = order[k];
          sums[order[k]] += weight;
        }
        next_data[t] = ranks > top_k ? order[top_k] : -1;
        if (ranks == top_k) {
          for (int64_t e = 0; e < num_experts; ++e) loads[e] += 1;
          continue;
        }
        token.set_marks(let_in, token.noisy[order[top_k]], num_experts);
        token.mark_chosen(order, top_k);
        add_loads(token, loads, num_experts);
      }
    });
    STD_TORCH_CHECK(!bad_logit.found(), kOp,
                    ": logits must be finite, got NaN or infinity for token ", bad_logit.position(),
                    ". Look for overflow in the router or its input.");
    auto* importance_data = static_cast<acc_t*>(importance.mutable_data_ptr());
    auto* load_data = static_cast<acc_t*>(load.mutable_data_ptr());
    for (int64_t i = 0; i < 2 * num_experts; ++i) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        sum += partial[chunk * 2 * num_experts + i];
      }
      (i < num_experts ? importance_data[i] : load_data[i - num_experts]) = static_cast<acc_t>(sum);
    }
    *static_cast<acc_t*>(loss.mutable_data_ptr()) =
        static_cast<acc_t>(variation(importance_data, num_experts).squared +
                           variation(load_data, num_experts).squared);
  });
  return {weights, importance, load, loss, ids, runner_up};
}

// Gradient of a sum over the tokens [E], that of the loss included.
template <typename acc_t>
std::vector<acc_t> sum_gradient(const std::optional<Tensor>& grad_sums,
                                const std::optional<Tensor>& grad_loss, const Tensor& sums) {
  const Tensor source = as_contiguous(sums);
  const auto* values = static_cast<const acc_t*>(source.const_data_ptr());
  const auto count = static_cast<int64_t>(source.numel());
  std::vector<acc_t> wanted(count, acc_t(0));
  if (grad_loss) {
    const Variation along = variation(values, count);
    const acc_t scale = *static_cast<const acc_t*>(grad_loss->const_data_ptr());
    for (int64_t e = 0; e < count; ++e) {
      wanted[e] = static_cast<acc_t>(scale * (along.offset + along.slope * values[e]));
    }
  }
  if (grad_sums) {
    const Tensor given = as_contiguous(*grad_sums);
    const auto* data = static_cast<const acc_t*>(given.const_data_ptr());
    for (int64_t e = 0; e < count; ++e) wanted[e] += data[e];
  }
  return wanted;
}

std::tuple<Tensor, Tensor> noisy_topk_route_backward(
    const std::optional<Tensor>& grad_topk_weights, const std::optional<Tensor>& grad_importance,
    const std::optional<Tensor>& grad_load, const std::optional<Tensor>& grad_loss,
    const Tensor& clean, const Tensor& spread, const Tensor& noise, const Tensor& topk_ids,
    const Tensor& runner_up, const Tensor& importance, const Tensor& load, double min_noise) {
  constexpr const char* kOp = "noisy_topk_route_backward";
  check_noisy(kOp, clean, spread, noise, min_noise);
  check_noisy_grads(kOp, grad_topk_weights, grad_importance, grad_load, grad_loss, clean, topk_ids,
                    runner_up, importance, load);
  const int64_t num_tokens = clean.size(0), num_experts = clean.size(1), top_k = topk_ids.size(1);
  const Tensor z = as_contiguous(clean), s = as_contiguous(spread), n = as_contiguous(noise),
               ids = as_contiguous(topk_ids), next = as_contiguous(runner_up);
  std::optional<Tensor> grad_weights;
  if (grad_topk_weights) grad_weights = as_contiguous(*grad_topk_weights);
  Tensor grad_clean = torch::stable::new_empty(clean, clean.sizes());
  Tensor grad_spread = torch::stable::new_empty(clean, clean.sizes());
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  FirstError bad_token;
  MOEOPS_DISPATCH_FLOAT(clean.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const std::vector<acc_t> over_importance =
        sum_gradient<acc_t>(grad_importance, grad_loss, importance);
    const std::vector<acc_t> over_load = sum_gradient<acc_t>(grad_load, grad_loss, load);
    const auto* clean_data = static_cast<const scalar_t*>(z.const_data_ptr());
    const auto* spread_data = static_cast<const scalar_t*>(s.const_data_ptr());
    const auto* noise_data = static_cast<const scalar_t*>(n.const_data_ptr());
    const auto* weight_grads =
        grad_weights ? static_cast<const acc_t*>(grad_weights->const_data_ptr()) : nullptr;
    const auto* next_data = static_cast<const int64_t*>(next.const_data_ptr());
    auto* clean_target = static_cast<scalar_t*>(grad_clean.mutable_data_ptr());
    auto* spread_target = static_cast<scalar_t*>(grad_spread.mutable_data_ptr());
    const Ranges ranges(num_tokens, grain_rows(num_experts));
    constexpr int64_t kKinds = NoisyToken<acc_t>::kKinds;
    // Per range: the token, the gradient of its noisy logits, the powers of the chosen ones, the
    // rises of its load and the distances to the marks.
    constexpr int64_t kRows = kKinds + 4;
    std::vector<acc_t> values(ranges.count() * kRows * num_experts);
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      acc_t* scratch = values.data() + range * kRows * num_experts;
      NoisyToken<acc_t> token(scratch, num_experts);
      acc_t* grad = scratch + kKinds * num_experts;
      acc_t* powers = grad + num_experts;
      acc_t* rises = powers + num_experts;
      acc_t* distances = rises + num_experts;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * num_experts;
        const int64_t* own_ids = id_data + t * top_k;
        bool valid = next_data[t] >= -1 && next_data[t] < num_experts;
        for (int64_t k = 0; k < top_k; ++k) {
          valid = valid && own_ids[k] >= 0 && own_ids[k] < num_experts;
        }
        if (!valid) {
          bad_token.report(t);
          continue;
        }
        load_token(token, clean_data + row, spread_data + row, noise_data + row, num_experts,
                   static_cast<acc_t>(min_noise));
        std::fill(grad, grad + num_experts, acc_t(0));
        acc_t top = -std::numeric_limits<acc_t>::infinity(), total = 0, dot = 0;
        for (int64_t k = 0; k < top_k; ++k) top = std::max(top, token.noisy[own_ids[k]]);
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t e = own_ids[k];
          powers[e] = exponential(token.noisy[e] - top);
          total += powers[e];
          grad[e] = (weight_grads ? weight_grads[t * top_k + k] : 0) + over_importance[e];
          dot += powers[e] * grad[e];
        }
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t e = own_ids[k];
          grad[e] = powers[e] / total * (grad[e] - dot / total);
        }
        // The load depends on the marks, too: what it takes from one expert's own logit it gives to
        // the logit that is its mark.
        const int64_t last = own_ids[top_k - 1], left = next_data[t];
        if (left >= 0) {
          token.set_marks(token.noisy[last], token.noisy[left], num_experts);
          token.mark_chosen(own_ids, top_k);
          load_rises(token, over_load.data(), rises, distances, num_experts);
          std::copy(rises, rises + num_experts, powers);
          acc_t by_chosen = 0;
          for (int64_t k = 0; k < top_k; ++k) {
            by_chosen += powers[own_ids[k]];
            powers[own_ids[k]] = 0;
          }
          grad[last] -= sum_of(powers, num_experts);
          grad[left] -= by_chosen;
        } else {
          std::fill(rises, rises + 2 * num_experts, acc_t(0));
        }
        store_gradients(token, spread_data + row, grad, rises, distances, num_experts,
                        clean_target + row, spread_target + row);
      }
    });
  });
  STD_TORCH_CHECK(!bad_token.found(), kOp, ": topk_ids and runner_up must be experts below ",
                  num_experts, ", got others for token ", bad_token.position(),
                  ". Pass what noisy_topk_route returned.");
  return {grad_clean, grad_spread};
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("noisy_topk_route", TORCH_BOX(&moeops::cpu::noisy_topk_route));
  m.impl("noisy_topk_route_backward", TORCH_BOX(&moeops::cpu::noisy_topk_route_backward));
}
