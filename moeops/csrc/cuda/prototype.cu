// prototype_route and its backward on CUDA.
#include "balance.h"
#include "kernels/prototype.cuh"

namespace moeops::cuda {

namespace {

Outputs prototype_route(const Tensor& logits, int64_t num_prototypes) {
  constexpr auto kOp = "prototype_route";
  check_prototypes(kOp, logits, num_prototypes);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_accumulate(logits);
  const int num_experts = static_cast<int>(z.size(1)), groups = static_cast<int>(num_prototypes);
  Outputs outputs;
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    outputs = add_up_route<Acc>(
        z, num_prototypes, stream,
        [&](auto slots, int blocks, int threads, Acc* weights, int64_t* ids, Acc* partial_sums,
            int32_t* partial_counts) {
          auto* kernel = &prototype_route_kernel<scalar_t, decltype(slots)::value>;
          kernel<<<blocks, threads, balance_shared_bytes<Acc>(num_experts, 0, 0, 0), stream>>>(
              static_cast<const scalar_t*>(z.data_ptr()), z.size(0), num_experts, groups, weights,
              ids, partial_sums, partial_counts, bad_values.device_pointer());
        });
  });
  refuse_bad_logits(kOp, bad_values);
  return outputs;
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
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  Tensor grad_logits = empty_on(logits, logits.sizes(), accumulate_type(logits.scalar_type()));
  if (logits.size(0) == 0) return in_type_of(logits, grad_logits);
  const std::optional<Tensor> grad_weights = contiguous_or_none(grad_topk_weights),
                              grad_shares = contiguous_or_none(grad_sums);
  const Tensor z = as_accumulate(logits), ids = as_contiguous(topk_ids),
               counts = as_contiguous(tokens_per_expert);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(z.size(1), [&] {
      prototype_route_backward_kernel<scalar_t, kSlots>
          <<<backward_blocks(z), kBackwardThreads, 0, current_stream(logits)>>>(
              pointer_or_null<Acc>(grad_weights), pointer_or_null<Acc>(grad_shares),
              pointer_or_null<Acc>(grad_loss), static_cast<const scalar_t*>(z.data_ptr()),
              static_cast<const int64_t*>(ids.data_ptr()),
              static_cast<const int32_t*>(counts.data_ptr()), z.size(0),
              static_cast<int>(z.size(1)), static_cast<int>(ids.size(1)),
              static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return in_type_of(logits, grad_logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("prototype_route", TORCH_BOX(&prototype_route));
  m.impl("prototype_route_backward", TORCH_BOX(&prototype_route_backward));
}

}  // namespace moeops::cuda
