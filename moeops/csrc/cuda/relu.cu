// relu_route and its backward on CUDA.
#include "balance.h"
#include "kernels/relu.cuh"

namespace moeops::cuda {

namespace {

Outputs relu_route(const Tensor& logits) {
  constexpr auto kOp = "relu_route";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_accumulate(logits);
  const int num_experts = static_cast<int>(z.size(1));
  Outputs outputs;
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    outputs = add_up_route<Acc>(
        z, num_experts, stream,
        [&](auto slots, int blocks, int threads, Acc* weights, int64_t* ids, Acc* partial_sums,
            int32_t* partial_counts) {
          auto* kernel = &relu_route_kernel<scalar_t, decltype(slots)::value>;
          kernel<<<blocks, threads, balance_shared_bytes<Acc>(num_experts, 0, 0, 0), stream>>>(
              static_cast<const scalar_t*>(z.data_ptr()), z.size(0), num_experts, weights, ids,
              partial_sums, partial_counts, bad_values.device_pointer());
        });
  });
  refuse_bad_logits(kOp, bad_values);
  return outputs;
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
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  Tensor grad_logits = empty_on(logits, logits.sizes(), accumulate_type(logits.scalar_type()));
  if (logits.size(0) == 0) return in_type_of(logits, grad_logits);
  const std::optional<Tensor> grad_weights = contiguous_or_none(grad_topk_weights),
                              grad_shares = contiguous_or_none(grad_sums);
  const Tensor z = as_accumulate(logits), counts = as_contiguous(tokens_per_expert);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(z.size(1), [&] {
      relu_route_backward_kernel<scalar_t, kSlots>
          <<<backward_blocks(z), kBackwardThreads, 0, current_stream(logits)>>>(
              pointer_or_null<Acc>(grad_weights), pointer_or_null<Acc>(grad_shares),
              pointer_or_null<Acc>(grad_loss), static_cast<const scalar_t*>(z.data_ptr()),
              static_cast<const int32_t*>(counts.data_ptr()), z.size(0),
              static_cast<int>(z.size(1)), static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return in_type_of(logits, grad_logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("relu_route", TORCH_BOX(&relu_route));
  m.impl("relu_route_backward", TORCH_BOX(&relu_route_backward));
}

}  // namespace moeops::cuda
