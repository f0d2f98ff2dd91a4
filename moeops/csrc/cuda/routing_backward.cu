// topk_route_backward on CUDA.
#include <torch/csrc/stable/library.h>

#include "checks/routing.h"
#include "common.h"
#include "device_dispatch.h"
#include "kernels/routing.cuh"
#include "text.h"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarpSize;

Tensor topk_route_backward(const Tensor& grad_topk_weights, const Tensor& logits,
                           const Tensor& topk_ids, const Text& score, bool renormalize,
                           double scale) {
  constexpr auto kOp = "topk_route_backward";
  check_topk_route_backward(kOp, grad_topk_weights, logits, topk_ids);
  check_register_experts(kOp, logits.size(1));
  const RouteOptions options = chosen_options(kOp, logits, topk_ids, score, renormalize, scale);
  DeviceGuard guard(logits.get_device_index());
  const int64_t num_tokens = logits.size(0);
  Tensor grad_logits = empty_on(logits, logits.sizes(), logits.scalar_type());
  if (num_tokens == 0) return grad_logits;
  const Tensor g = as_contiguous(grad_topk_weights), z = as_contiguous(logits),
               ids = as_contiguous(topk_ids);
  MOEOPS_DISPATCH_DEVICE_FLOAT(z.scalar_type(), kOp, [&] {
    using Acc = device_accumulate_t<scalar_t>;
    MOEOPS_DISPATCH_SLOTS(options.num_experts, [&] {
      topk_route_backward_kernel<scalar_t, kSlots>
          <<<grid_blocks(num_tokens, kWarpsPerBlock), kThreads, 0, current_stream(logits)>>>(
              static_cast<const Acc*>(g.data_ptr()), static_cast<const scalar_t*>(z.data_ptr()),
              static_cast<const int64_t*>(ids.data_ptr()), num_tokens, options,
              static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("topk_route_backward", TORCH_BOX(&topk_route_backward));
}

}  // namespace moeops::cuda
