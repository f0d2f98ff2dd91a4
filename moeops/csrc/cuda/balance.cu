// topk_route_balance and its backward on CUDA.
#include "balance.h"
#include "checks/routing.h"
#include "text.h"

namespace moeops::cuda {

namespace {

Outputs topk_route_balance(const Tensor& logits, int64_t top_k, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& uniform,
                           const std::optional<Tensor>& temperature, const Text& score,
                           bool renormalize, double scale, int64_t num_groups, int64_t top_groups,
                           const Text& group_score, double top_p, double min_score,
                           std::optional<int64_t> num_counted) {
  constexpr auto kOp = "topk_route_balance";
  const RouteOptions options =
      balance_options(kOp, logits, bias, uniform, temperature, top_k, score, renormalize, scale,
                      num_groups, top_groups, group_score, top_p, min_score, num_counted);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const ScalarType acc = accumulate_type(logits.scalar_type());
  const auto prepared = [&](const std::optional<Tensor>& t) {
    return t && t->scalar_type() != acc ? contiguous_or_none(torch::stable::to(*t, acc))
                                        : contiguous_or_none(t);
  };
  const std::optional<Tensor> shift = prepared(bias), draws = prepared(uniform),
                              divisor = prepared(temperature);
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_accumulate(logits);
  const bool one_group = options.groups_by_sum && top_groups == 1 && score == "softmax";
  const bool by_logit = !bias && (num_groups == 1 || one_group);
  Outputs outputs;
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    outputs = add_up_route<Acc>(
        z, top_k, stream,
        [&](auto, int blocks, int threads, Acc* weights, int64_t* ids, Acc* partial_sums,
            int32_t* partial_counts) {
          const auto launch =
              by_logit ? &launch_balance_forward<Acc, true> : &launch_balance_forward<Acc, false>;
          launch({static_cast<const Acc*>(z.data_ptr()), pointer_or_null<Acc>(shift),
                  pointer_or_null<Acc>(draws), pointer_or_null<Acc>(divisor), z.size(0), options,
                  blocks, threads, weights, ids, partial_sums, partial_counts,
                  bad_values.device_pointer(), stream});
        });
  });
  refuse_bad_logits(kOp, bad_values);
  return outputs;
}

Tensor topk_route_balance_backward(const std::optional<Tensor>& grad_topk_weights,
                                   const std::optional<Tensor>& grad_sums,
                                   const std::optional<Tensor>& grad_loss, const Tensor& logits,
                                   const std::optional<Tensor>& temperature, const Tensor& topk_ids,
                                   const Tensor& tokens_per_expert, const Text& score,
                                   bool renormalize, double scale) {
  constexpr auto kOp = "topk_route_balance_backward";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, topk_ids.size(1),
                      tokens_per_expert);
  check_temperature(kOp, temperature, logits);
  check_register_experts(kOp, logits.size(1));
  const RouteOptions options = chosen_options(kOp, logits, topk_ids, score, renormalize, scale);
  DeviceGuard guard(logits.get_device_index());
  const ScalarType acc = accumulate_type(logits.scalar_type());
  Tensor grad_logits = empty_on(logits, logits.sizes(), accumulate_type(logits.scalar_type()));
  if (logits.size(0) == 0) return in_type_of(logits, grad_logits);
  const std::optional<Tensor> grad_weights = contiguous_or_none(grad_topk_weights),
                              grad_shares = contiguous_or_none(grad_sums);
  std::optional<Tensor> divisor = temperature;
  if (divisor && divisor->scalar_type() != acc) divisor = torch::stable::to(*divisor, acc);
  const Tensor z = as_accumulate(logits), ids = as_contiguous(topk_ids),
               counts = as_contiguous(tokens_per_expert);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(options.num_experts, [&] {
      auto* kernel = options.sigmoid ? &topk_route_balance_backward_kernel<scalar_t, kSlots, true>
                                     : &topk_route_balance_backward_kernel<scalar_t, kSlots, false>;
      kernel<<<backward_blocks(z), kBackwardThreads, 0, current_stream(logits)>>>(
          pointer_or_null<Acc>(grad_weights), pointer_or_null<Acc>(grad_shares),
          pointer_or_null<Acc>(grad_loss), static_cast<const scalar_t*>(z.data_ptr()),
          pointer_or_null<Acc>(divisor), static_cast<const int64_t*>(ids.data_ptr()),
          static_cast<const int32_t*>(counts.data_ptr()), z.size(0), options,
          static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return in_type_of(logits, grad_logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("topk_route_balance", TORCH_BOX(&topk_route_balance));
  m.impl("topk_route_balance_backward", TORCH_BOX(&topk_route_balance_backward));
}

}  // namespace moeops::cuda
