// The arguments of topk_route, its backward and chosen_weights.
#pragma once

#include <string>

#include "checks.h"
#include "route_options.h"

namespace moeops {

// Checked options for logits [T, E].
inline RouteOptions route_options(const char* op, const Tensor& logits, int64_t top_k,
                                  const std::string& score, bool renormalize, double scale,
                                  int64_t num_groups = 1, int64_t top_groups = 1) {
  const int64_t num_experts = logits.size(1);
  check_route_options(op, num_experts, top_k, score, num_groups, top_groups);
  STD_TORCH_CHECK(num_experts < std::numeric_limits<int32_t>::max(), op,
                  ": logits must have fewer than 2^31 columns, got ", num_experts,
                  ". Use fewer experts.");
  RouteOptions options{};
  options.num_experts = static_cast<int>(num_experts);
  options.top_k = static_cast<int>(top_k);
  options.num_groups = static_cast<int>(num_groups);
  options.top_groups = static_cast<int>(top_groups);
  options.sigmoid = score == "sigmoid";
  options.renormalize = renormalize;
  options.scale = scale;
  return options;
}

// Checked options of topk_route_balance; without num_counted all choices count.
inline RouteOptions balance_options(const char* op, const Tensor& logits,
                                    const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& uniform,
                                    const std::optional<Tensor>& temperature, int64_t top_k,
                                    const std::string& score, bool renormalize, double scale,
                                    int64_t num_groups, int64_t top_groups,
                                    const std::string& group_score, double top_p, double min_score,
                                    std::optional<int64_t> num_counted) {
  const int64_t counted = num_counted.value_or(top_k);
  check_balance_arguments(op, logits, bias, uniform, temperature, top_k, score, num_groups,
                          top_groups, group_score, counted);
  RouteOptions options =
      route_options(op, logits, top_k, score, renormalize, scale, num_groups, top_groups);
  options.groups_by_sum = group_score == "sum";
  options.top_p = top_p;
  options.min_score = min_score;
  options.num_counted = static_cast<int>(counted);
  return options;
}

// Options of a backward, which takes the choices as they are: groups and the reach of top_k are the
// forward's business.
inline RouteOptions chosen_options(const char* op, const Tensor& logits, const Tensor& topk_ids,
                                   const std::string& score, bool renormalize, double scale) {
  check_score(op, score);
  RouteOptions options{};
  options.num_experts = static_cast<int>(logits.size(1));
  options.top_k = static_cast<int>(topk_ids.size(1));
  options.num_groups = 1;
  options.top_groups = 1;
  options.sigmoid = score == "sigmoid";
  options.renormalize = renormalize;
  options.scale = scale;
  return options;
}

inline void check_topk_route(const char* op, const Tensor& logits,
                             const std::optional<Tensor>& bias) {
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  check_optional_vector(op, "bias", bias, logits.size(1), logits);
}

inline void check_topk_route_backward(const char* op, const Tensor& grad_topk_weights,
                                      const Tensor& logits, const Tensor& topk_ids) {
  check_ids_of_logits(op, logits, topk_ids);
  check_dim(op, "grad_topk_weights", grad_topk_weights, 2);
  check_type(op, "grad_topk_weights", grad_topk_weights, accumulate_type(logits.scalar_type()),
             "float32 (float64 for float64 logits)");
  check_same_device(op, "grad_topk_weights", grad_topk_weights, logits);
  check_size(op, "grad_topk_weights", grad_topk_weights, 0, topk_ids.size(0));
  check_size(op, "grad_topk_weights", grad_topk_weights, 1, topk_ids.size(1));
}

}  // namespace moeops
