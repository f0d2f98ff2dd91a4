// noisy_topk_route on CUDA, and its kernels in float32.
#include <torch/csrc/stable/library.h>

#include "noisy.cuh"

namespace moeops::cuda {

// In noisy_float64.cu, for the time that its kernels take to compile.
extern template void run_noisy_forward<double>(const Tensor&, const Tensor&, const Tensor&,
                                               const NoisyShape&, int32_t*, cudaStream_t, Tensor&,
                                               Tensor&, Tensor&, Tensor&, Tensor&, Tensor&);

namespace {

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
  const NoisyShape shape = noisy_shape(clean, top_k, min_noise);
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
    run_noisy_forward<Acc>(z, s, n, shape, bad_values.device_pointer(), stream, topk_weights,
                           topk_ids, runner_up, importance, load, loss);
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, kOp, ": logits must be finite, got NaN or infinity in ", bad,
                  " places. Look at the router's input and weights.");
  return {topk_weights, importance, load, loss, topk_ids, runner_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("noisy_topk_route", TORCH_BOX(&noisy_topk_route));
}

}  // namespace moeops::cuda
