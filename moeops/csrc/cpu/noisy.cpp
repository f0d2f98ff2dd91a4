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

  static constexpr int64_t kKinds = 4;
  NoisyToken(acc_t* scratch, int64_t num_experts)
      : clean(scratch),
        noisy(scratch + num_experts),
        noise(scratch + 2 * num_experts),
        sigma(scratch + 3 * num_experts) {}

  // Whether all noisy logits are finite.
  template <typename scalar_t>
  bool load(const scalar_t* clean_row, const scalar_t* spread_row, const scalar_t* noise_row,
            int64_t num_experts, acc_t min_noise) const {
    bool finite = true;
    for (int64_t e = 0; e < num_experts; ++e) {
      const acc_t spread = static_cast<acc_t>(spread_row[e]);
      clean[e] = static_cast<acc_t>(clean_row[e]);
      noise[e] = static_cast<acc_t>(noise_row[e]);
      sigma[e] = std::max(spread, acc_t(0)) + std::log1p(std::exp(-std::abs(spread))) + min_noise;
      noisy[e] = clean[e] + noise[e] * sigma[e];
      finite &= std::abs(noisy[e]) <= std::numeric_limits<acc_t>::max();
    }
    return finite;
  }
};

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
      const NoisyToken<acc_t> token(values.data() + range * kKinds * num_experts, num_experts);
      int32_t* order = orders.data() + range * num_experts;
      for (int64_t t = begin * kTokensPerSum; t < std::min(num_tokens, end * kTokensPerSum); ++t) {
        const int64_t row = t * num_experts;
        if (!token.load(clean_data + row, spread_data + row, noise_data + row, num_experts,
                        static_cast<acc_t>(min_noise))) {
          bad_logit.report(t);
          continue;
        }
        select_top(token.noisy, num_experts, ranks, order);
        acc_t* sums = partial.data() + t / kTokensPerSum * 2 * num_experts;
        acc_t* loads = sums + num_experts;
        const acc_t top = token.noisy[order[0]], let_in = token.noisy[order[top_k - 1]];
        acc_t total = 0;
        for (int64_t k = 0; k < top_k; ++k) total += std::exp(token.noisy[order[k]] - top);
        for (int64_t k = 0; k < top_k; ++k) {
          const acc_t weight = std::exp(token.noisy[order[k]] - top) / total;
          weight_data[t * top_k + k] = weight;
          id_data[t * top_k + k] = order[k];
          sums[order[k]] += weight;
        }
        next_data[t] = ranks > top_k ? order[top_k] : -1;
        if (ranks == top_k) {
          for (int64_t e = 0; e < num_experts; ++e) loads[e] += 1;
          continue;
        }
        const acc_t left_out = token.noisy[order[top_k]];
        std::sort(order, order + top_k);
        for (int64_t e = 0, next = 0; e < num_experts; ++e) {
          const bool in = next < top_k && order[next] == e;
          next += in;
          // Phi(x) is erfc(-x / sqrt(2)) / 2.
          const acc_t distance = ((in ? left_out : let_in) - token.clean[e]) / token.sigma[e];
          loads[e] += acc_t(0.5) * std::erfc(distance * acc_t(0.70710678118654752440));
        }
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
  const Tensor dense = as_contiguous(sums);
  const auto* values = static_cast<const acc_t*>(dense.const_data_ptr());
  const auto count = static_cast<int64_t>(dense.numel());
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
    // Per range: the token, the gradient of its noisy logits, and which experts it chose.
    std::vector<acc_t> values(ranges.count() * (kKinds + 2) * num_experts);
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      acc_t* scratch = values.data() + range * (kKinds + 2) * num_experts;
      const NoisyToken<acc_t> token(scratch, num_experts);
      acc_t* grad = scratch + kKinds * num_experts;
      acc_t* chosen = grad + num_experts;
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
        token.load(clean_data + row, spread_data + row, noise_data + row, num_experts,
                   static_cast<acc_t>(min_noise));
        std::fill(grad, grad + 2 * num_experts, acc_t(0));
        acc_t top = -std::numeric_limits<acc_t>::infinity(), total = 0, dot = 0;
        for (int64_t k = 0; k < top_k; ++k) top = std::max(top, token.noisy[own_ids[k]]);
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t e = own_ids[k];
          chosen[e] = std::exp(token.noisy[e] - top);
          total += chosen[e];
          grad[e] = (weight_grads ? weight_grads[t * top_k + k] : 0) + over_importance[e];
          dot += chosen[e] * grad[e];
        }
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t e = own_ids[k];
          grad[e] = chosen[e] / total * (grad[e] - dot / total);
        }
        // The marks first: what the load takes from one expert's own logit it gives to them.
        const int64_t last = own_ids[top_k - 1], left = next_data[t];
        const auto rise_of = [&](int64_t e, acc_t& distance) {
          const acc_t mark = token.noisy[chosen[e] > 0 ? left : last];
          distance = (token.clean[e] - mark) / token.sigma[e];
          const acc_t density =
              std::exp(acc_t(-0.5) * distance * distance) * acc_t(0.39894228040143267794);
          return over_load[e] * density / token.sigma[e];
        };
        acc_t distance = 0;
        // exp may round a chosen expert's weight to 0; its place among the chosen decides.
        for (int64_t k = 0; k < top_k; ++k) {
          chosen[own_ids[k]] = 1;
        }
        acc_t to_last = 0, to_left = 0;
        for (int64_t e = 0; left >= 0 && e < num_experts; ++e) {
          (chosen[e] > 0 ? to_left : to_last) -= rise_of(e, distance);
        }
        grad[last] += to_last;
        if (left >= 0) grad[left] += to_left;
        for (int64_t e = 0; e < num_experts; ++e) {
          const acc_t rise = left >= 0 ? rise_of(e, distance) : acc_t(0);
          const acc_t logistic = 1 / (1 + std::exp(-static_cast<acc_t>(spread_data[row + e])));
          clean_target[row + e] = static_cast<scalar_t>(rise + grad[e]);
          spread_target[row + e] =
              static_cast<scalar_t>((grad[e] * token.noise[e] - rise * distance) * logistic);
        }
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
