// The launches of noisy_topk_route and its backward, whose types are compiled in files of their
// own. Every tensor is contiguous and in the accumulate type.
#pragma once

#include <optional>

#include "common.h"
#include "device_dispatch.h"
#include "kernels/noisy.cuh"

namespace moeops::cuda {

inline NoisyShape noisy_shape(const Tensor& clean, int64_t top_k, double min_noise) {
  return {clean.size(0), static_cast<int>(clean.size(1)), static_cast<int>(top_k), min_noise};
}

template <typename Acc>
void run_noisy_forward(const Tensor& z, const Tensor& s, const Tensor& n, const NoisyShape& shape,
                       int32_t* bad_values, cudaStream_t stream, Tensor& topk_weights,
                       Tensor& topk_ids, Tensor& runner_up, Tensor& importance, Tensor& load,
                       Tensor& loss) {
  constexpr int64_t kThreadsPerSm = 1024;  // as topk_route_balance
  using scalar_t = Acc;
  const int64_t num_tokens = shape.num_tokens, num_experts = shape.num_experts;
  MOEOPS_DISPATCH_SLOTS(shape.num_experts, [&] {
    constexpr int kThreads = balance_threads(kSlots), kWarps = kThreads / kWarpSize;
    const int64_t most = device_limits(z.get_device_index()).num_sms *
                         std::max<int64_t>(1, kSlots <= 8 ? kThreadsPerSm / kThreads : 1);
    const auto blocks = static_cast<int>(std::min(ceil_div(num_tokens, kWarps), most));
    Tensor partial = empty_on(z, {blocks, 2, num_experts}, z.scalar_type());
    Tensor ticket = empty_on(z, {1}, ScalarType::Int);
    auto* kernel = &noisy_topk_route_kernel<scalar_t, kSlots>;
    const size_t shared = kWarpSize * (kWarpSize + 1) * sizeof(double) +
                          kWarps * route_shared_bytes<Acc>(shape.top_k + 1, 0);
    allow_shared_bytes(kernel, shared);
    kernel<<<blocks, kThreads, shared, stream>>>(
        static_cast<const scalar_t*>(z.data_ptr()), static_cast<const scalar_t*>(s.data_ptr()),
        static_cast<const scalar_t*>(n.data_ptr()), shape,
        static_cast<Acc*>(topk_weights.data_ptr()), static_cast<int64_t*>(topk_ids.data_ptr()),
        static_cast<int64_t*>(runner_up.data_ptr()), static_cast<Acc*>(partial.data_ptr()),
        static_cast<int32_t*>(ticket.data_ptr()), bad_values);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    add_up_noisy_kernel<Acc><<<grid_blocks(2 * num_experts, kWarpSize), 1024, 0, stream>>>(
        static_cast<const Acc*>(partial.data_ptr()), blocks, shape.num_experts,
        static_cast<int32_t*>(ticket.data_ptr()), static_cast<Acc*>(importance.data_ptr()),
        static_cast<Acc*>(load.data_ptr()), static_cast<Acc*>(loss.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <typename Acc>
void run_noisy_backward(const std::optional<Tensor>& weights, const std::optional<Tensor>& first,
                        const std::optional<Tensor>& second, const std::optional<Tensor>& grad_loss,
                        const Tensor& z, const Tensor& s, const Tensor& n, const Tensor& ids,
                        const Tensor& next, const Tensor& sums, const Tensor& loads,
                        const NoisyShape& shape, cudaStream_t stream, Tensor& grad_clean,
                        Tensor& grad_spread) {
  constexpr int kBackwardThreads = 256;
  constexpr int64_t kBackwardBlocksPerSm = 8;
  using scalar_t = Acc;
  const int64_t most = kBackwardBlocksPerSm * device_limits(z.get_device_index()).num_sms;
  const auto blocks = static_cast<unsigned>(
      std::min(ceil_div(shape.num_tokens, kBackwardThreads / kWarpSize), most));
  const auto read = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const Acc*>(t->data_ptr()) : nullptr;
  };
  MOEOPS_DISPATCH_SLOTS(shape.num_experts, [&] {
    noisy_topk_route_backward_kernel<scalar_t, kSlots><<<blocks, kBackwardThreads, 0, stream>>>(
        read(weights), read(first), read(second), read(grad_loss),
        static_cast<const scalar_t*>(z.data_ptr()), static_cast<const scalar_t*>(s.data_ptr()),
        static_cast<const scalar_t*>(n.data_ptr()), static_cast<const int64_t*>(ids.data_ptr()),
        static_cast<const int64_t*>(next.data_ptr()), static_cast<const Acc*>(sums.data_ptr()),
        static_cast<const Acc*>(loads.data_ptr()), shape,
        static_cast<scalar_t*>(grad_clean.data_ptr()),
        static_cast<scalar_t*>(grad_spread.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace moeops::cuda
