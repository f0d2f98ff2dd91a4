// topk_route, its backward and chosen_weights on the CPU. One thread owns a range of tokens and
// works through each token's logits in scratch memory of its own.
#include "cpu/routing.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "dispatch.h"
#include "text.h"

namespace moeops::cpu {
namespace {

template <typename scalar_t>
void route_kernel(const scalar_t* logits, const accumulate_t<scalar_t>* bias, int64_t num_tokens,
                  int64_t num_experts, const RouteOptions& options, accumulate_t<scalar_t>* weights,
                  int64_t* ids, FirstError& bad_logit) {
  using acc_t = accumulate_t<scalar_t>;
  const Ranges ranges(num_tokens, grain_rows(num_experts));
  // Per range: logits, scores, choice, worth of groups; and an order of experts.
  std::vector<acc_t> values(ranges.count() * num_experts * 4);
  std::vector<int32_t> orders(ranges.count() * num_experts);
  ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    acc_t* z = values.data() + range * num_experts * 4;
    const RouteScratch<acc_t> scratch{z + num_experts, z + 2 * num_experts, z + 3 * num_experts,
                                      orders.data() + range * num_experts};
    for (int64_t token = begin; token < end; ++token) {
      const scalar_t* source = logits + token * num_experts;
      if (!load_row(source, num_experts, z)) {
        bad_logit.report(token);
        continue;
      }
      route_token<acc_t>(options, z, bias, nullptr, num_experts, scratch,
                         weights + token * options.top_k, ids + token * options.top_k);
    }
  });
}

std::tuple<Tensor, Tensor> topk_route(const Tensor& logits, int64_t top_k,
                                      const std::optional<Tensor>& bias, const Text& score,
                                      bool renormalize, double scale, int64_t num_groups,
                                      int64_t top_groups) {
  constexpr const char* kOp = "topk_route";
  check_topk_route(kOp, logits, bias);
  const RouteOptions options =
      route_options(kOp, logits, top_k, score, renormalize, scale, num_groups, top_groups);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);

  const Tensor source = as_contiguous(logits);
  Tensor weights =
      torch::stable::new_empty(logits, {num_tokens, top_k}, accumulate_type(logits.scalar_type()));
  Tensor ids = torch::stable::new_empty(logits, {num_tokens, top_k}, ScalarType::Long);
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    std::vector<acc_t> bias_values;
    if (bias) bias_values = read_bias<acc_t>(kOp, *bias);
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    FirstError bad_logit;
    route_kernel<scalar_t>(data, bias ? bias_values.data() : nullptr, num_tokens, num_experts,
                           options, static_cast<acc_t*>(weights.mutable_data_ptr()),
                           static_cast<int64_t*>(ids.mutable_data_ptr()), bad_logit);
    if (bad_logit.found()) refuse_logits(kOp, data, bad_logit.position(), num_experts);
  });
  return {weights, ids};
}

template <typename scalar_t>
void route_backward_kernel(const accumulate_t<scalar_t>* grad_weights, const scalar_t* logits,
                           const int64_t* ids, int64_t num_tokens, int64_t num_experts,
                           const RouteOptions& options, scalar_t* grad_logits, FirstError& bad_id) {
  using acc_t = accumulate_t<scalar_t>;
  const Ranges ranges(num_tokens, grain_rows(num_experts));
  // Per range: logits, scores, gradient.
  std::vector<acc_t> values(ranges.count() * num_experts * 3);
  ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    acc_t* z = values.data() + range * num_experts * 3;
    acc_t* scores = z + num_experts;
    acc_t* grad = scores + num_experts;
    for (int64_t token = begin; token < end; ++token) {
      load_row(logits + token * num_experts, num_experts, z);
      const int64_t first = token * options.top_k;
      const int64_t bad = route_token_grads(options, z, grad_weights + first, ids + first,
                                            num_experts, scores, grad);
      if (bad >= 0) bad_id.report(first + bad);
      std::transform(grad, grad + num_experts, grad_logits + token * num_experts,
                     [](acc_t g) { return static_cast<scalar_t>(g); });
    }
  });
}

Tensor topk_route_backward(const Tensor& grad_topk_weights, const Tensor& logits,
                           const Tensor& topk_ids, const Text& score, bool renormalize,
                           double scale) {
  constexpr const char* kOp = "topk_route_backward";
  check_topk_route_backward(kOp, grad_topk_weights, logits, topk_ids);
  const RouteOptions options = chosen_options(kOp, logits, topk_ids, score, renormalize, scale);

  const Tensor source = as_contiguous(logits);
  const Tensor grad = as_contiguous(grad_topk_weights);
  const Tensor ids = as_contiguous(topk_ids);
  Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  if (grad_logits.numel() == 0) return grad_logits;
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  FirstError bad_id;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    route_backward_kernel<scalar_t>(
        static_cast<const accumulate_t<scalar_t>*>(grad.const_data_ptr()),
        static_cast<const scalar_t*>(source.const_data_ptr()), id_data, logits.size(0),
        logits.size(1), options, static_cast<scalar_t*>(grad_logits.mutable_data_ptr()), bad_id);
  });
  STD_TORCH_CHECK(!bad_id.found(), kOp, ": topk_ids must be in [-1, ", logits.size(1), "), got ",
                  id_data[bad_id.position()], " at pair ", bad_id.position(),
                  ". Pass the ids that topk_route returned.");
  return grad_logits;
}

template <typename scalar_t>
void chosen_kernel(const scalar_t* logits, const int64_t* ids, int64_t num_tokens,
                   int64_t num_experts, const RouteOptions& options,
                   accumulate_t<scalar_t>* weights, FirstError& bad_id) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();
  const int64_t top_k = options.top_k;
  const bool over_all = !options.sigmoid && !options.renormalize;
  const Ranges ranges(num_tokens, grain_rows(over_all ? num_experts : top_k));
  std::vector<acc_t> values(over_all ? ranges.count() * num_experts : 0);  // per range: logits
  ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    acc_t* z = values.data() + (over_all ? range * num_experts : 0);
    for (int64_t t = begin; t < end; ++t) {
      const scalar_t* row = logits + t * num_experts;
      acc_t* own = weights + t * top_k;
      acc_t top = kLowest, sum = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t id = ids[t * top_k + k];
        if (id < -1 || id >= num_experts) bad_id.report(t * top_k + k);
        own[k] = id >= 0 && id < num_experts ? static_cast<acc_t>(row[id]) : kLowest;
        top = std::max(top, own[k]);
      }
      if (over_all) {
        load_row(row, num_experts, z);
        top = largest_of(z, num_experts);
        sum = softmax_powers(z, top, z, num_experts);
      }
      for (int64_t k = 0; k < top_k; ++k) {
        if (own[k] == kLowest) {
          own[k] = 0;
        } else if (options.sigmoid) {
          own[k] = sigmoid(own[k]);
        } else {
          own[k] = exponential(own[k] - top);
        }
        if (!over_all) sum += own[k];
      }
      if (!over_all && !options.renormalize) sum = 1;
      const acc_t factor =
          static_cast<acc_t>(options.scale) / std::max(sum, std::numeric_limits<acc_t>::min());
      for (int64_t k = 0; k < top_k; ++k) own[k] *= factor;
    }
  });
}

Tensor chosen_weights(const Tensor& logits, const Tensor& topk_ids, const Text& score,
                      bool renormalize, double scale) {
  constexpr const char* kOp = "chosen_weights";
  check_ids_of_logits(kOp, logits, topk_ids);
  const RouteOptions options = chosen_options(kOp, logits, topk_ids, score, renormalize, scale);
  const Tensor source = as_contiguous(logits), ids = as_contiguous(topk_ids);
  Tensor weights =
      torch::stable::new_empty(logits, ids.sizes(), accumulate_type(logits.scalar_type()));
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  FirstError bad_id;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    chosen_kernel<scalar_t>(static_cast<const scalar_t*>(source.const_data_ptr()), id_data,
                            logits.size(0), logits.size(1), options,
                            static_cast<accumulate_t<scalar_t>*>(weights.mutable_data_ptr()),
                            bad_id);
  });
  STD_TORCH_CHECK(!bad_id.found(), kOp, ": topk_ids must be in [-1, ", logits.size(1), "), got ",
                  id_data[bad_id.position()], " at pair ", bad_id.position(),
                  ". Drop a pair with -1.");
  return weights;
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("topk_route", TORCH_BOX(&moeops::cpu::topk_route));
  m.impl("topk_route_backward", TORCH_BOX(&moeops::cpu::topk_route_backward));
  m.impl("chosen_weights", TORCH_BOX(&moeops::cpu::chosen_weights));
}
