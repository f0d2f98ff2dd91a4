// topk_route_balance, prototype_route, relu_route and their backwards on the CPU. One thread owns a
// range of tokens, in chunks of a fixed number so that sums do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/routing.h"
#include "cpu/scores.h"
#include "dispatch.h"
#include "text.h"

namespace moeops::cpu {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename acc_t>
const acc_t* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const acc_t*>(t->const_data_ptr()) : nullptr;
}

// A vector or a scalar of any float type in the accumulate type of the logits.
std::optional<Tensor> prepared(const std::optional<Tensor>& t, const Tensor& logits) {
  const ScalarType acc = accumulate_type(logits.scalar_type());
  return t && t->scalar_type() != acc ? contiguous_or_none(torch::stable::to(*t, acc))
                                      : contiguous_or_none(t);
}

// The outputs of a route with K slots: weights, sums, loss, ids and counts. route(t, row, scratch,
// order, weights, ids, sums) routes one token, whose finite logits are in the first of kRouteRows
// rows of scratch memory, and adds its shares to sums.
constexpr int64_t kRouteRows = 4;
template <typename scalar_t, typename Route>
void route_all(const char* op, const Tensor& logits, int64_t num_counted, const Outputs& outputs,
               const Route& route) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const auto* data = static_cast<const scalar_t*>(logits.const_data_ptr());
  Tensor weights = std::get<0>(outputs), sums = std::get<1>(outputs), loss = std::get<2>(outputs),
         ids = std::get<3>(outputs), counts = std::get<4>(outputs);
  const int64_t top_k = weights.size(1);
  auto* weight_data = static_cast<acc_t*>(weights.mutable_data_ptr());
  auto* id_data = static_cast<int64_t*>(ids.mutable_data_ptr());
  const int64_t num_chunks = (num_tokens + kTokensPerSum - 1) / kTokensPerSum;
  const Ranges ranges(num_chunks, grain_rows(kTokensPerSum * num_experts));
  std::vector<acc_t> partial(num_chunks * num_experts, acc_t(0));
  std::vector<int32_t> partial_counts(ranges.count() * num_experts, 0);
  std::vector<acc_t> values(ranges.count() * num_experts * kRouteRows);
  std::vector<int32_t> orders(ranges.count() * num_experts);
  FirstError bad_logit;
  ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    acc_t* scratch = values.data() + range * num_experts * kRouteRows;
    int32_t* own_counts = partial_counts.data() + range * num_experts;
    for (int64_t t = begin * kTokensPerSum; t < std::min(num_tokens, end * kTokensPerSum); ++t) {
      const scalar_t* row = data + t * num_experts;
      if (!load_row(row, num_experts, scratch)) {
        bad_logit.report(t);
        continue;
      }
      route(t, row, scratch, orders.data() + range * num_experts, weight_data + t * top_k,
            id_data + t * top_k, partial.data() + t / kTokensPerSum * num_experts);
      for (int64_t k = 0; k < num_counted; ++k) {
        const int64_t id = id_data[t * top_k + k];
        if (id >= 0) ++own_counts[id];
      }
    }
  });
  if (bad_logit.found()) refuse_logits(op, data, bad_logit.position(), num_experts);
  auto* sum_data = static_cast<acc_t*>(sums.mutable_data_ptr());
  auto* count_data = static_cast<int32_t*>(counts.mutable_data_ptr());
  double dot = 0, total = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    double sum = 0;
    int32_t count = 0;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) sum += partial[chunk * num_experts + e];
    for (int64_t range = 0; range < ranges.count(); ++range) {
      count += partial_counts[range * num_experts + e];
    }
    sum_data[e] = static_cast<acc_t>(sum);
    count_data[e] = count;
    dot += count * sum;
    total += count;
  }
  *static_cast<acc_t*>(loss.mutable_data_ptr()) =
      total > 0 ? static_cast<acc_t>(dot * num_experts / (num_tokens * total)) : acc_t(0);
}

Outputs make_outputs(const Tensor& logits, int64_t top_k) {
  const ScalarType acc = accumulate_type(logits.scalar_type());
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  return {torch::stable::new_empty(logits, {num_tokens, top_k}, acc),
          torch::stable::new_empty(logits, {num_experts}, acc),
          torch::stable::new_empty(logits, {}, acc),
          torch::stable::new_empty(logits, {num_tokens, top_k}, ScalarType::Long),
          torch::stable::new_empty(logits, {num_experts}, ScalarType::Int)};
}

// Gradient of the sums [E], that of the loss included; each of them may be missing.
template <typename acc_t>
std::vector<acc_t> sum_gradients(const std::optional<Tensor>& grad_sums,
                                 const std::optional<Tensor>& grad_loss, const Tensor& counts,
                                 int64_t num_tokens) {
  const auto num_experts = static_cast<int64_t>(counts.numel());
  std::vector<acc_t> wanted(num_experts, acc_t(0));
  if (const std::optional<Tensor> given = contiguous_or_none(grad_sums)) {
    const auto* data = static_cast<const acc_t*>(given->const_data_ptr());
    std::copy(data, data + num_experts, wanted.begin());
  }
  if (grad_loss) {
    const Tensor given = as_contiguous(counts);
    const auto* data = static_cast<const int32_t*>(given.const_data_ptr());
    double total = 0;
    for (int64_t e = 0; e < num_experts; ++e) total += data[e];
    const double factor = total > 0 ? num_experts / (num_tokens * total) : 0.0;
    const acc_t scaled =
        *static_cast<const acc_t*>(grad_loss->const_data_ptr()) * static_cast<acc_t>(factor);
    for (int64_t e = 0; e < num_experts; ++e) wanted[e] += scaled * static_cast<acc_t>(data[e]);
  }
  return wanted;
}

// One divisor of all logits; 1 if there is none.
template <typename acc_t>
acc_t read_temperature(const char* op, const std::optional<Tensor>& temperature) {
  const acc_t value = temperature ? *data_or_null<acc_t>(temperature) : acc_t(1);
  STD_TORCH_CHECK(value > 0, op, ": temperature must be above 0, got ", value, ". Use 1 for none.");
  return value;
}

Outputs topk_route_balance(const Tensor& logits, int64_t top_k, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& uniform,
                           const std::optional<Tensor>& temperature, const Text& score,
                           bool renormalize, double scale, int64_t num_groups, int64_t top_groups,
                           const Text& group_score, double top_p, double min_score,
                           std::optional<int64_t> num_counted) {
  constexpr const char* kOp = "topk_route_balance";
  const RouteOptions options =
      balance_options(kOp, logits, bias, uniform, temperature, top_k, score, renormalize, scale,
                      num_groups, top_groups, group_score, top_p, min_score, num_counted);
  const int64_t num_experts = logits.size(1);
  const Tensor source = as_contiguous(logits);
  const std::optional<Tensor> draws = prepared(uniform, logits),
                              divisor = prepared(temperature, logits);
  const Outputs outputs = make_outputs(logits, top_k);
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    std::vector<acc_t> bias_values;
    if (bias) bias_values = read_bias<acc_t>(kOp, *bias);
    const acc_t* biases = bias ? bias_values.data() : nullptr;
    const acc_t* drawn = data_or_null<acc_t>(draws);
    const acc_t heat = read_temperature<acc_t>(kOp, divisor);
    route_all<scalar_t>(
        kOp, source, options.num_counted, outputs,
        [&](int64_t t, const scalar_t*, acc_t* z, int32_t* order, acc_t* weights, int64_t* ids,
            acc_t* sums) {
          if (divisor) {
            for (int64_t e = 0; e < num_experts; ++e) z[e] /= heat;
          }
          RouteScratch<acc_t> scratch;
          scratch.scores = z + num_experts;
          scratch.choice = z + 2 * num_experts;
          scratch.worth = z + 3 * num_experts;
          scratch.order = order;
          const bool has_scores = route_token<acc_t>(
              options, z, biases, drawn ? drawn + t : nullptr, num_experts, scratch, weights, ids);
          if (has_scores && !options.sigmoid) {
            for (int64_t e = 0; e < num_experts; ++e) sums[e] += scratch.scores[e];
            return;
          }
          with_score(score, [&](auto sigmoid) {
            add_shares(sigmoid, z, scratch.choice, scratch.scores, sums, num_experts);
          });
        });
  });
  return outputs;
}

Tensor topk_route_balance_backward(const std::optional<Tensor>& grad_topk_weights,
                                   const std::optional<Tensor>& grad_sums,
                                   const std::optional<Tensor>& grad_loss, const Tensor& logits,
                                   const std::optional<Tensor>& temperature, const Tensor& topk_ids,
                                   const Tensor& tokens_per_expert, const Text& score,
                                   bool renormalize, double scale) {
  constexpr const char* kOp = "topk_route_balance_backward";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, topk_ids.size(1),
                      tokens_per_expert);
  check_temperature(kOp, temperature, logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const RouteOptions options = chosen_options(kOp, logits, topk_ids, score, renormalize, scale);
  const Tensor source = as_contiguous(logits), ids = as_contiguous(topk_ids);
  const std::optional<Tensor> weight_grads = contiguous_or_none(grad_topk_weights),
                              divisor = prepared(temperature, logits);
  Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  if (grad_logits.numel() == 0) return grad_logits;
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  FirstError bad_id;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const std::vector<acc_t> wanted =
        sum_gradients<acc_t>(grad_sums, grad_loss, tokens_per_expert, num_tokens);
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    const acc_t* given = data_or_null<acc_t>(weight_grads);
    const acc_t heat = read_temperature<acc_t>(kOp, divisor);
    auto* target = static_cast<scalar_t*>(grad_logits.mutable_data_ptr());
    const Ranges ranges(num_tokens, grain_rows(num_experts));
    // Per range: logits, scores, gradient through the weights, that through the sums; scratch.
    constexpr int64_t kRows = 7;
    std::vector<acc_t> values(ranges.count() * num_experts * kRows);
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      acc_t* z = values.data() + range * num_experts * kRows;
      acc_t* scores = z + num_experts;
      acc_t* grad = scores + num_experts;
      acc_t* share_grad = grad + num_experts;
      acc_t* scratch = share_grad + num_experts;
      for (int64_t t = begin; t < end; ++t) {
        load_row(data + t * num_experts, num_experts, z);
        for (int64_t e = 0; divisor && e < num_experts; ++e) z[e] /= heat;
        if (given) {
          const int64_t first = t * options.top_k;
          const int64_t bad = route_token_grads(options, z, given + first, id_data + first,
                                                num_experts, scores, grad);
          if (bad >= 0) bad_id.report(first + bad);
        }
        with_score(score, [&](auto sigmoid) {
          share_grads(sigmoid, wanted.data(), z, scratch, num_experts, share_grad);
        });
        for (int64_t e = 0; e < num_experts; ++e) {
          target[t * num_experts + e] =
              static_cast<scalar_t>((given ? grad[e] + share_grad[e] : share_grad[e]) / heat);
        }
      }
    });
  });
  STD_TORCH_CHECK(!bad_id.found(), kOp, ": topk_ids must be in [-1, ", num_experts, "), got ",
                  id_data[bad_id.position()], " at pair ", bad_id.position(),
                  ". Pass the ids that topk_route_balance returned.");
  return grad_logits;
}

Outputs prototype_route(const Tensor& logits, int64_t num_prototypes) {
  constexpr const char* kOp = "prototype_route";
  check_prototypes(kOp, logits, num_prototypes);
  const int64_t num_experts = logits.size(1), size = num_experts / num_prototypes;
  const Tensor source = as_contiguous(logits);
  const Outputs outputs = make_outputs(logits, num_prototypes);
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    route_all<scalar_t>(kOp, source, num_prototypes, outputs,
                        [&](int64_t, const scalar_t*, acc_t* z, int32_t*, acc_t* weights,
                            int64_t* ids, acc_t* sums) {
                          acc_t* shares = z + num_experts;
                          for (int64_t g = 0; g < num_prototypes; ++g) {
                            const acc_t* own = z + g * size;
                            softmax_row(own, shares + g * size, size);
                            ids[g] = std::max_element(own, own + size) - z;
                            weights[g] = shares[ids[g]];
                          }
                          for (int64_t e = 0; e < num_experts; ++e) sums[e] += shares[e];
                        });
  });
  return outputs;
}

Tensor prototype_route_backward(const std::optional<Tensor>& grad_topk_weights,
                                const std::optional<Tensor>& grad_sums,
                                const std::optional<Tensor>& grad_loss, const Tensor& logits,
                                const Tensor& topk_ids, const Tensor& tokens_per_expert) {
  constexpr const char* kOp = "prototype_route_backward";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_prototypes(kOp, logits, topk_ids.size(1));
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, topk_ids.size(1),
                      tokens_per_expert);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const int64_t groups = topk_ids.size(1), size = num_experts / groups;
  const Tensor source = as_contiguous(logits), ids = as_contiguous(topk_ids);
  const std::optional<Tensor> weight_grads = contiguous_or_none(grad_topk_weights);
  Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  if (grad_logits.numel() == 0) return grad_logits;
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const std::vector<acc_t> wanted =
        sum_gradients<acc_t>(grad_sums, grad_loss, tokens_per_expert, num_tokens);
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    const acc_t* given = data_or_null<acc_t>(weight_grads);
    auto* target = static_cast<scalar_t*>(grad_logits.mutable_data_ptr());
    const Ranges ranges(num_tokens, grain_rows(num_experts));
    std::vector<acc_t> values(ranges.count() * num_experts * 2);  // per range: logits, shares
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      acc_t* z = values.data() + range * num_experts * 2;
      acc_t* shares = z + num_experts;
      for (int64_t t = begin; t < end; ++t) {
        load_row(data + t * num_experts, num_experts, z);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t first = g * size, chosen = id_data[t * groups + g];
          softmax_row(z + first, shares + first, size);
          const auto grad_of = [&](int64_t e) {
            return wanted[e] + (given && e == chosen ? given[t * groups + g] : acc_t(0));
          };
          acc_t mean = 0;
          for (int64_t e = first; e < first + size; ++e) mean += shares[e] * grad_of(e);
          for (int64_t e = first; e < first + size; ++e) {
            target[t * num_experts + e] = static_cast<scalar_t>(shares[e] * (grad_of(e) - mean));
          }
        }
      }
    });
  });
  return grad_logits;
}

Outputs relu_route(const Tensor& logits) {
  constexpr const char* kOp = "relu_route";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  const int64_t num_experts = logits.size(1);
  const Tensor source = as_contiguous(logits);
  const Outputs outputs = make_outputs(logits, num_experts);
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    route_all<scalar_t>(kOp, source, num_experts, outputs,
                        [&](int64_t, const scalar_t*, acc_t* z, int32_t*, acc_t* weights,
                            int64_t* ids, acc_t* sums) {
                          for (int64_t e = 0; e < num_experts; ++e) {
                            weights[e] = std::max(z[e], acc_t(0));
                            ids[e] = z[e] > 0 ? e : -1;
                            sums[e] += weights[e];
                          }
                        });
  });
  return outputs;
}

Tensor relu_route_backward(const std::optional<Tensor>& grad_topk_weights,
                           const std::optional<Tensor>& grad_sums,
                           const std::optional<Tensor>& grad_loss, const Tensor& logits,
                           const Tensor& tokens_per_expert) {
  constexpr const char* kOp = "relu_route_backward";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, logits.size(1),
                      tokens_per_expert);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const Tensor source = as_contiguous(logits);
  const std::optional<Tensor> weight_grads = contiguous_or_none(grad_topk_weights);
  Tensor grad_logits = torch::stable::new_empty(logits, logits.sizes());
  if (grad_logits.numel() == 0) return grad_logits;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const std::vector<acc_t> wanted =
        sum_gradients<acc_t>(grad_sums, grad_loss, tokens_per_expert, num_tokens);
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    const acc_t* given = data_or_null<acc_t>(weight_grads);
    auto* target = static_cast<scalar_t*>(grad_logits.mutable_data_ptr());
    torch::stable::parallel_for(
        0, num_tokens, grain_rows(num_experts), [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            for (int64_t e = 0; e < num_experts; ++e) {
              const int64_t at = t * num_experts + e;
              const acc_t grad = wanted[e] + (given ? given[at] : acc_t(0));
              target[at] = static_cast<scalar_t>(static_cast<acc_t>(data[at]) > 0 ? grad : 0);
            }
          }
        });
  });
  return grad_logits;
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("topk_route_balance", TORCH_BOX(&moeops::cpu::topk_route_balance));
  m.impl("topk_route_balance_backward", TORCH_BOX(&moeops::cpu::topk_route_balance_backward));
  m.impl("prototype_route", TORCH_BOX(&moeops::cpu::prototype_route));
  m.impl("prototype_route_backward", TORCH_BOX(&moeops::cpu::prototype_route_backward));
  m.impl("relu_route", TORCH_BOX(&moeops::cpu::relu_route));
  m.impl("relu_route_backward", TORCH_BOX(&moeops::cpu::relu_route_backward));
}
