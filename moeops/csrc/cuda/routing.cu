// topk_route on CUDA, and its kernels where the choice follows the logits.
#include <torch/csrc/stable/library.h>

#include "checks/routing.h"
#include "routing_forward.cuh"
#include "text.h"

namespace moeops::cuda {

// In routing_by_score*.cu, for the time that their kernels take to compile.
extern template void launch_topk_route<double, false>(const TopkRoute<double>&);
extern template void launch_topk_route<float, false>(const TopkRoute<float>&);
extern template void launch_topk_route<__half, false>(const TopkRoute<__half>&);
extern template void launch_topk_route<__nv_bfloat16, false>(const TopkRoute<__nv_bfloat16>&);

namespace {

std::tuple<Tensor, Tensor> topk_route(const Tensor& logits, int64_t top_k,
                                      const std::optional<Tensor>& bias, const Text& score,
                                      bool renormalize, double scale, int64_t num_groups,
                                      int64_t top_groups) {
  constexpr auto kOp = "topk_route";
  check_topk_route(kOp, logits, bias);
  const RouteOptions options =
      route_options(kOp, logits, top_k, score, renormalize, scale, num_groups, top_groups);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const ScalarType acc = accumulate_type(logits.scalar_type());
  std::optional<Tensor> shift;
  if (bias) {
    shift = as_contiguous(bias->scalar_type() == acc ? *bias : torch::stable::to(*bias, acc));
  }
  const int64_t num_tokens = logits.size(0);
  Tensor topk_weights = empty_on(logits, {num_tokens, top_k}, acc);
  Tensor topk_ids = empty_on(logits, {num_tokens, top_k}, ScalarType::Long);
  if (num_tokens == 0) return {topk_weights, topk_ids};
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_contiguous(logits);
  MOEOPS_DISPATCH_DEVICE_FLOAT(z.scalar_type(), kOp, [&] {
    using Acc = device_accumulate_t<scalar_t>;
    const auto launch = bias || options.num_groups > 1 ? &launch_topk_route<scalar_t, false>
                                                       : &launch_topk_route<scalar_t, true>;
    launch({static_cast<const scalar_t*>(z.data_ptr()),
            shift ? static_cast<const Acc*>(shift->data_ptr()) : nullptr, num_tokens, options,
            static_cast<Acc*>(topk_weights.data_ptr()), static_cast<int64_t*>(topk_ids.data_ptr()),
            bad_values.device_pointer(), stream});
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, kOp, ": logits must be finite, got NaN or infinity in ", bad,
                  " places. Look at the router's input and weights.");
  return {topk_weights, topk_ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) { m.impl("topk_route", TORCH_BOX(&topk_route)); }

}  // namespace moeops::cuda
