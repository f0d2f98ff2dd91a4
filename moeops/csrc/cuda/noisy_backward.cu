// noisy_topk_route_backward on CUDA, and its kernels in float32.
#include <torch/csrc/stable/library.h>

#include "noisy.cuh"

namespace moeops::cuda {

// In noisy_backward_float64.cu, for the time that its kernels take to compile.
extern template void run_noisy_backward<double>(
    const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const Tensor&, const Tensor&, const Tensor&, const NoisyShape&, cudaStream_t, Tensor&, Tensor&);

namespace {

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
  const NoisyShape shape = noisy_shape(clean, topk_ids.size(1), min_noise);
  const ScalarType acc = accumulate_type(clean.scalar_type());
  Tensor grad_clean = empty_on(clean, clean.sizes(), acc);
  Tensor grad_spread = empty_on(clean, clean.sizes(), acc);
  const auto narrowed = [&](const Tensor& grad) {
    return acc == clean.scalar_type() ? grad : torch::stable::to(grad, clean.scalar_type());
  };
  if (shape.num_tokens == 0) return {narrowed(grad_clean), narrowed(grad_spread)};
  const auto weights = contiguous_or_none(grad_topk_weights),
             first = contiguous_or_none(grad_importance), second = contiguous_or_none(grad_load);
  const Tensor z = as_accumulate(clean), s = as_accumulate(spread), n = as_accumulate(noise),
               ids = as_contiguous(topk_ids), next = as_contiguous(runner_up),
               sums = as_contiguous(importance), loads = as_contiguous(load);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    run_noisy_backward<Acc>(weights, first, second, grad_loss, z, s, n, ids, next, sums, loads,
                            shape, current_stream(clean), grad_clean, grad_spread);
  });
  return {narrowed(grad_clean), narrowed(grad_spread)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("noisy_topk_route_backward", TORCH_BOX(&noisy_topk_route_backward));
}

}  // namespace moeops::cuda
