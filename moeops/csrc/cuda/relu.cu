// relu_route and its backward on CUDA.
#include "balance.h"
#include "kernels/relu.cuh"

namespace moeops::cuda {

namespace {

Outputs relu_route(const Tensor& logits) {
  constexpr auto kOp = "relu_route";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  return run_route(kOp, logits, logits.size(1), [](auto slots, const auto& r) {
    using Acc = typename std::decay_t<decltype(r)>::Acc;
    relu_route_kernel<Acc, decltype(slots)::value>
        <<<r.blocks, r.threads, r.shared_bytes, r.stream>>>(r.logits, r.num_tokens, r.num_experts,
                                                            r.weights, r.ids, r.partial_sums,
                                                            r.partial_counts, r.bad_values);
  });
}

Tensor relu_route_backward(const std::optional<Tensor>& grad_topk_weights,
                           const std::optional<Tensor>& grad_sums,
                           const std::optional<Tensor>& grad_loss, const Tensor& logits,
                           const Tensor& tokens_per_expert) {
  constexpr auto kOp = "relu_route_backward";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, logits.size(1),
                      tokens_per_expert);
  return run_route_backward(kOp, grad_topk_weights, grad_sums, grad_loss, logits, tokens_per_expert,
                            [](auto slots, const auto& r) {
                              using Acc = typename std::decay_t<decltype(r)>::Acc;
                              relu_route_backward_kernel<Acc, decltype(slots)::value>
                                  <<<r.blocks, kBackwardThreads, 0, r.stream>>>(
                                      r.grad_weights, r.grad_sums, r.grad_loss, r.logits, r.counts,
                                      r.num_tokens, r.num_experts, r.grad_logits);
                            });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("relu_route", TORCH_BOX(&relu_route));
  m.impl("relu_route_backward", TORCH_BOX(&relu_route_backward));
}

}  // namespace moeops::cuda
