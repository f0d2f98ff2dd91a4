// The table of contents of torch.ops.moeops: every schema with a native kernel, once
// (moeops/comm/exchange.py defines all_to_all_rows, which is made of torch's collectives).
// Dimension names (T tokens, K experts per token, N = T * K pairs, R rows, E experts, D model
// width, H hidden width, C capacity) and the meaning of each op stand in moeops/ops/<family>.py and
// docs/ops.md, the truth in moeops/reference/ops.py. Options follow the star, have the defaults of
// the public function, and are given by name. Before the star stand the public function's arguments
// in its order, a plan as its three tensors; then, None unless given, the optional tensors that the
// function takes by name and that the star cannot hold, as autograd knows no tensors by name.
// Kernels get all arguments in the order written here.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moeops, m) {
  // routing: logits [T, E] -> weights [T, K], ids [T, K] int64
  m.def(
      "topk_route(Tensor logits, SymInt top_k, Tensor? bias=None, *, str score='softmax', bool "
      "renormalize=True, float scale=1.0, SymInt num_groups=1, SymInt top_groups=1) -> (Tensor "
      "topk_weights, Tensor topk_ids)");
  m.def(
      "topk_route_backward(Tensor grad_topk_weights, Tensor logits, Tensor topk_ids, *, str "
      "score='softmax', bool renormalize=True, float scale=1.0) -> Tensor");
  m.def(
      "chosen_weights(Tensor logits, Tensor topk_ids, *, str score='softmax', bool "
      "renormalize=True, float scale=1.0) -> Tensor");

  // scores: logits [T, E] -> sums over the tokens of score / sum of the token's scores, [E]
  m.def("score_sums(Tensor logits, *, str score='softmax') -> Tensor");
  m.def("score_sums_backward(Tensor grad_sums, Tensor logits, *, str score='softmax') -> Tensor");
  m.def("alignment_sum(Tensor logits, Tensor topk_ids, SymInt experts_per_group) -> Tensor");
  m.def(
      "alignment_sum_backward(Tensor grad_sum, Tensor logits, Tensor topk_ids, SymInt "
      "experts_per_group) "
      "-> Tensor");

  // balance: topk_route, and what losses read of it: score_sums [E], balance_loss [], counts [E]
  m.def(
      "topk_route_balance(Tensor logits, SymInt top_k, Tensor? bias=None, Tensor? uniform=None, "
      "Tensor? temperature=None, *, str score='softmax', bool renormalize=True, float scale=1.0, "
      "SymInt num_groups=1, SymInt top_groups=1, str group_score='top2', float top_p=1.0, float "
      "min_score=0.0, SymInt? num_counted=None) -> (Tensor topk_weights, Tensor score_sums, Tensor "
      "balance_loss, Tensor topk_ids, Tensor tokens_per_expert)");
  m.def(
      "topk_route_balance_backward(Tensor? grad_topk_weights, Tensor? grad_sums, Tensor? "
      "grad_loss, Tensor logits, Tensor? temperature, Tensor topk_ids, Tensor tokens_per_expert, "
      "*, str score='softmax', bool renormalize=True, float scale=1.0) -> Tensor");
  m.def(
      "prototype_route(Tensor logits, SymInt num_prototypes) -> (Tensor topk_weights, Tensor "
      "score_sums, Tensor balance_loss, Tensor topk_ids, Tensor tokens_per_expert)");
  m.def(
      "prototype_route_backward(Tensor? grad_topk_weights, Tensor? grad_sums, Tensor? grad_loss, "
      "Tensor logits, Tensor topk_ids, Tensor tokens_per_expert) -> Tensor");
  m.def(
      "relu_route(Tensor logits) -> (Tensor topk_weights, Tensor score_sums, Tensor balance_loss, "
      "Tensor topk_ids, Tensor tokens_per_expert)");
  m.def(
      "relu_route_backward(Tensor? grad_topk_weights, Tensor? grad_sums, Tensor? grad_loss, "
      "Tensor logits, Tensor tokens_per_expert) -> Tensor");

  // noisy: clean logits, spread and noise [T, E] -> importance and load [E], their loss []
  m.def(
      "noisy_topk_route(Tensor clean, Tensor spread, Tensor noise, SymInt top_k, *, float "
      "min_noise=0.01) -> (Tensor topk_weights, Tensor importance, Tensor load, Tensor loss, "
      "Tensor topk_ids, Tensor runner_up)");
  m.def(
      "noisy_topk_route_backward(Tensor? grad_topk_weights, Tensor? grad_importance, Tensor? "
      "grad_load, Tensor? grad_loss, Tensor clean, Tensor spread, Tensor noise, Tensor topk_ids, "
      "Tensor runner_up, Tensor importance, Tensor load, *, float min_noise=0.01) "
      "-> (Tensor grad_clean, Tensor grad_spread)");

  // sorting: ids [T, K] -> row_to_pair [R], pair_to_row [T, K], expert_offsets [E + 1], all int32
  m.def(
      "sort_tokens(Tensor topk_ids, SymInt num_experts, SymInt? num_rows=None, *, bool "
      "drop_out_of_range=False) -> (Tensor row_to_pair, Tensor pair_to_row, Tensor "
      "expert_offsets)");
  m.def("count_tokens(Tensor topk_ids, SymInt num_experts) -> Tensor");
  m.def(
      "limit_capacity(Tensor topk_ids, SymInt num_experts, SymInt capacity, Tensor? priority=None, "
      "*, bool by_choice=False) -> Tensor");

  // permute: x [T, D] <-> rows [R, D]
  m.def(
      "permute_tokens(Tensor x, Tensor row_to_pair, Tensor pair_to_row, Tensor expert_offsets) "
      "-> Tensor");
  m.def(
      "unpermute_tokens(Tensor rows, Tensor row_to_pair, Tensor pair_to_row, Tensor "
      "expert_offsets, Tensor? topk_weights=None) -> Tensor");
  m.def(
      "unpermute_tokens_backward(Tensor grad_y, Tensor rows, Tensor row_to_pair, Tensor "
      "pair_to_row, Tensor expert_offsets, Tensor topk_weights) -> (Tensor grad_rows, Tensor "
      "grad_topk_weights)");

  // padding: rows [R, D] <-> padded [E, C, D]
  m.def("pad_rows(Tensor rows, Tensor expert_offsets, SymInt capacity) -> Tensor");
  m.def("unpad_rows(Tensor padded, Tensor expert_offsets, SymInt num_rows) -> Tensor");

  // grouped linear: rows [R, D], weight [E, H, D] -> [R, H]
  m.def(
      "grouped_linear(Tensor rows, Tensor weight, Tensor expert_offsets, Tensor? bias=None) -> "
      "Tensor");
  m.def(
      "grouped_linear_weight_grad(Tensor grad, Tensor rows, Tensor expert_offsets, *, bool "
      "transposed=False) -> Tensor");
  m.def("grouped_sum(Tensor rows, Tensor expert_offsets) -> Tensor");

  // expert block: x [T, D] -> y [T, D]; pre_activation [R, 2H or H] is what the backward needs, and
  // has no rows without keep_pre
  m.def(
      "moe_mlp(Tensor x, Tensor row_to_pair, Tensor pair_to_row, Tensor expert_offsets, Tensor "
      "topk_weights, Tensor w_up, Tensor w_down, Tensor? b_up=None, Tensor? b_down=None, *, str "
      "activation='swiglu', float alpha=1.0, float? limit=None, float offset=0.0, bool "
      "interleaved=False, bool keep_pre=True) -> (Tensor y, Tensor pre_activation)");
  // its backward in two: what tokens wait for, and the weights' gradients from the gradient of the
  // pre-activation, grad_pre [R, 2H or H], and weighted_hidden [R, H]
  m.def(
      "moe_mlp_backward_data(Tensor grad_y, Tensor x, Tensor row_to_pair, Tensor pair_to_row, "
      "Tensor expert_offsets, Tensor topk_weights, Tensor w_up, Tensor w_down, Tensor? b_up, "
      "Tensor? b_down, Tensor pre_activation, *, str activation='swiglu', float alpha=1.0, float? "
      "limit=None, float offset=0.0, bool interleaved=False, bool need_x=True, bool "
      "need_topk_weights=True, bool need_grad_pre=True, bool need_weighted_hidden=True) -> (Tensor "
      "grad_x, Tensor grad_topk_weights, Tensor grad_pre, Tensor weighted_hidden)");
  m.def(
      "moe_mlp_backward_weights(Tensor grad_y, Tensor x, Tensor row_to_pair, Tensor pair_to_row, "
      "Tensor expert_offsets, Tensor topk_weights, Tensor grad_pre, Tensor weighted_hidden, *, "
      "bool need_w_up=True, bool need_w_down=True, bool need_b_up=True, bool need_b_down=True, "
      "bool transposed_up=False, bool transposed_down=False) -> (Tensor grad_w_up, Tensor "
      "grad_w_down, Tensor grad_b_up, Tensor grad_b_down)");
}
