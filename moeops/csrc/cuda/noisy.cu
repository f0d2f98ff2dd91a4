// noisy_topk_route and its backward on CUDA.
#include <torch/csrc/stable/library.h>

#include "common.h"
#include "device_dispatch.h"
#include "kernels/noisy.cuh"

namespace moeops::cuda {

namespace {

constexpr int64_t kThreadsPerSm = 1024;  // as topk_route_balance
constexpr int kBackwardThreads = 256;
constexpr int64_t kBackwardBlocksPerSm = 8;

NoisyShape make_shape(const Tensor& clean, int64_t top_k, double min_noise) {
  return {clean.size(0), static_cast<int>(clean.size(1)), static_cast<int>(top_k), min_noise};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> noisy_topk_route(const Tensor& clean,
                                                                            const Tensor& spread,
                                                                            const Tensor& noise,
                                                                            int64_t top_k,
                                                                            double min_noise) {
  constexpr auto kOp = "noisy_topk_route";
  check_noisy(kOp, clean, spread, noise, min_noise);
  check_route_options(kOp, clean.size(1), top_k, "softmax", 1, 1);
  check_register_experts(kOp, clean.size(1));
  DeviceGuard guard(clean.get_device_index());
  const ScalarType acc = accumulate_type(clean.scalar_type());
  const NoisyShape shape = make_shape(clean, top_k, min_noise);
  const int64_t num_tokens = shape.num_tokens, num_experts = shape.num_experts;
  Tensor topk_weights = empty_on(clean, {num_tokens, top_k}, acc);
  Tensor topk_ids = empty_on(clean, {num_tokens, top_k}, ScalarType::Long);
  Tensor runner_up = empty_on(clean, {num_tokens}, ScalarType::Long);
  if (num_tokens == 0) {
    return {topk_weights,
            torch::stable::new_zeros(clean, {num_experts}, acc),
            torch::stable::new_zeros(clean, {num_experts}, acc),
            torch::stable::new_zeros(clean, {}, acc),
            topk_ids,
            runner_up};
  }
  Tensor importance = empty_on(clean, {num_experts}, acc);
  Tensor load = empty_on(clean, {num_experts}, acc);
  Tensor loss = empty_on(clean, {}, acc);
  const cudaStream_t stream = current_stream(clean);
  DebugCounter bad_values(clean, stream);
  const Tensor z = as_accumulate(clean), s = as_accumulate(spread), n = as_accumulate(noise);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(shape.num_experts, [&] {
      constexpr int kThreads = balance_threads(kSlots), kWarps = kThreads / kWarpSize;
      const int64_t most = device_limits(clean.get_device_index()).num_sms *
                           std::max<int64_t>(1, kSlots <= 8 ? kThreadsPerSm / kThreads : 1);
      const auto blocks = static_cast<int>(std::min(ceil_div(num_tokens, kWarps), most));
      Tensor partial = empty_on(clean, {blocks, 2, num_experts}, acc);
      Tensor ticket = empty_on(clean, {1}, ScalarType::Int);
      auto* kernel = &noisy_topk_route_kernel<scalar_t, kSlots>;
      const size_t shared = kWarpSize * (kWarpSize + 1) * sizeof(double) +
                            kWarps * route_shared_bytes<Acc>(shape.top_k + 1, 0);
      allow_shared_bytes(kernel, shared);
      kernel<<<blocks, kThreads, shared, stream>>>(
          static_cast<const scalar_t*>(z.data_ptr()), static_cast<const scalar_t*>(s.data_ptr()),
          static_cast<const scalar_t*>(n.data_ptr()), shape,
          static_cast<Acc*>(topk_weights.data_ptr()), static_cast<int64_t*>(topk_ids.data_ptr()),
          static_cast<int64_t*>(runner_up.data_ptr()), static_cast<Acc*>(partial.data_ptr()),
          static_cast<int32_t*>(ticket.data_ptr()), bad_values.device_pointer());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      add_up_noisy_kernel<Acc><<<grid_blocks(2 * num_experts, kWarpSize), 1024, 0, stream>>>(
          static_cast<const Acc*>(partial.data_ptr()), blocks, shape.num_experts,
          static_cast<int32_t*>(ticket.data_ptr()), static_cast<Acc*>(importance.data_ptr()),
          static_cast<Acc*>(load.data_ptr()), static_cast<Acc*>(loss.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, kOp, ": logits must be finite, got NaN or infinity in ", bad,
                  " places. Look at the router's input and weights.");
  return {topk_weights, importance, load, loss, topk_ids, runner_up};
}

std::tuple<Tensor, Tensor> noisy_topk_route_backward(
    const std::optional<Tensor>& grad_topk_weights, const std::optional<Tensor>& grad_importance,
    const std::optional<Tensor>& grad_load, const std::optional<Tensor>& grad_loss,
    const Tensor& clean, const Tensor& spread, const Tensor& noise, const Tensor& topk_ids,
    const Tensor& runner_up, const Tensor& importance, const Tensor& load, double min_noise) {
  constexpr auto kOp = "noisy_topk_route_backward";
  check_noisy(kOp, clean, spread, noise, min_noise);
  check_noisy_grads(kOp, grad_topk_weights, grad_importance, grad_load, grad_loss, clean, topk_ids,
                    runner_up, importance, load);
  check_register_experts(kOp, clean.size(1));
  DeviceGuard guard(clean.get_device_index());
  const NoisyShape shape = make_shape(clean, topk_ids.size(1), min_noise);
  const ScalarType acc = accumulate_type(clean.scalar_type());
  Tensor grad_clean = empty_on(clean, clean.sizes(), acc);
  Tensor grad_spread = empty_on(clean, clean.sizes(), acc);
  const auto narrowed = [&](const Tensor& grad) {
    return acc == clean.scalar_type() ? grad : torch::stable::to(grad, clean.scalar_type());
  };
  if (shape.num_tokens == 0) return {narrowed(grad_clean), narrowed(grad_spread)};
  const auto dense = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(as_contiguous(*t)) : t;
  };
  const auto weights = dense(grad_topk_weights), first = dense(grad_importance),
             second = dense(grad_load);
  const Tensor z = as_accumulate(clean), s = as_accumulate(spread), n = as_accumulate(noise),
               ids = as_contiguous(topk_ids), next = as_contiguous(runner_up),
               sums = as_contiguous(importance), loads = as_contiguous(load);
  const int64_t most = kBackwardBlocksPerSm * device_limits(clean.get_device_index()).num_sms;
  const auto blocks = static_cast<unsigned>(
      std::min(ceil_div(shape.num_tokens, kBackwardThreads / kWarpSize), most));
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    const auto read = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const Acc*>(t->data_ptr()) : nullptr;
    };
    MOEOPS_DISPATCH_SLOTS(shape.num_experts, [&] {
      noisy_topk_route_backward_kernel<scalar_t, kSlots>
          <<<blocks, kBackwardThreads, 0, current_stream(clean)>>>(
              read(weights), read(first), read(second), read(grad_loss),
              static_cast<const scalar_t*>(z.data_ptr()),
              static_cast<const scalar_t*>(s.data_ptr()),
              static_cast<const scalar_t*>(n.data_ptr()),
              static_cast<const int64_t*>(ids.data_ptr()),
              static_cast<const int64_t*>(next.data_ptr()),
              static_cast<const Acc*>(sums.data_ptr()), static_cast<const Acc*>(loads.data_ptr()),
              shape, static_cast<scalar_t*>(grad_clean.data_ptr()),
              static_cast<scalar_t*>(grad_spread.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {narrowed(grad_clean), narrowed(grad_spread)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("noisy_topk_route", TORCH_BOX(&noisy_topk_route));
  m.impl("noisy_topk_route_backward", TORCH_BOX(&noisy_topk_route_backward));
}

}  // namespace moeops::cuda
