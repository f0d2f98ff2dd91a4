// prototype_route and its backward on CUDA.
#include "balance.h"
#include "kernels/prototype.cuh"

namespace moeops::cuda {

namespace {

Outputs prototype_route(const Tensor& logits, int64_t num_prototypes) {
  constexpr auto kOp = "prototype_route";
  check_prototypes(kOp, logits, num_prototypes);
  return run_route(kOp, logits, num_prototypes, [&](auto slots, const auto& r) {
    using Acc = typename std::decay_t<decltype(r)>::Acc;
    prototype_route_kernel<Acc, decltype(slots)::value>
        <<<r.blocks, r.threads, r.shared_bytes, r.stream>>>(
            r.logits, r.num_tokens, r.num_experts, static_cast<int>(num_prototypes), r.weights,
            r.ids, r.partial_sums, r.partial_counts, r.bad_values);
  });
}

Tensor prototype_route_backward(const std::optional<Tensor>& grad_topk_weights,
                                const std::optional<Tensor>& grad_sums,
                                const std::optional<Tensor>& grad_loss, const Tensor& logits,
                                const Tensor& topk_ids, const Tensor& tokens_per_expert) {
  constexpr auto kOp = "prototype_route_backward";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_prototypes(kOp, logits, topk_ids.size(1));
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, topk_ids.size(1),
                      tokens_per_expert);
  const Tensor ids = as_contiguous(topk_ids);
  return run_route_backward(kOp, grad_topk_weights, grad_sums, grad_loss, logits, tokens_per_expert,
                            [&](auto slots, const auto& r) {
                              using Acc = typename std::decay_t<decltype(r)>::Acc;
                              prototype_route_backward_kernel<Acc, decltype(slots)::value>
                                  <<<r.blocks, kBackwardThreads, 0, r.stream>>>(
                                      r.grad_weights, r.grad_sums, r.grad_loss, r.logits,
                                      static_cast<const int64_t*>(ids.data_ptr()), r.counts,
                                      r.num_tokens, r.num_experts, static_cast<int>(ids.size(1)),
                                      r.grad_logits);
                            });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("prototype_route", TORCH_BOX(&prototype_route));
  m.impl("prototype_route_backward", TORCH_BOX(&prototype_route_backward));
}

}  // namespace moeops::cuda
