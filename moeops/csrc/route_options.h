// How a router's logits become choices and weights, for the CPU and the CUDA kernels.
#pragma once

namespace moeops {

struct RouteOptions {
  int num_experts;
  int top_k;
  int num_groups;
  int top_groups;
  bool sigmoid;  // scores are sigmoids of the logits, else their softmax
  bool renormalize;
  double scale;
  // Of topk_route_balance alone.
  bool groups_by_sum = false;  // a group is worth the sum of its scores, else its two best choices
  double top_p = 1;            // choices after this mass of scores are dropped; 1 for none
  double min_score = 0;        // choices but the first with less are dropped
  int num_counted = 0;         // how many choices of a token are counted
};

}  // namespace moeops
