// chosen_weights on CUDA.
#include <torch/csrc/stable/library.h>

#include "checks/routing.h"
#include "common.h"
#include "device_dispatch.h"
#include "kernels/chosen_weights.cuh"
#include "text.h"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarpSize;

Tensor chosen_weights(const Tensor& logits, const Tensor& topk_ids, const Text& score,
                      bool renormalize, double scale) {
  constexpr auto kOp = "chosen_weights";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_register_experts(kOp, logits.size(1));
  const RouteOptions options = chosen_options(kOp, logits, topk_ids, score, renormalize, scale);
  DeviceGuard guard(logits.get_device_index());
  const int64_t num_tokens = logits.size(0);
  Tensor topk_weights =
      empty_on(logits, {num_tokens, topk_ids.size(1)}, accumulate_type(logits.scalar_type()));
  if (topk_weights.numel() == 0) return topk_weights;
  const Tensor z = as_contiguous(logits), ids = as_contiguous(topk_ids);
  const cudaStream_t stream = current_stream(logits);
  MOEOPS_DISPATCH_DEVICE_FLOAT(z.scalar_type(), kOp, [&] {
    using Acc = device_accumulate_t<scalar_t>;
    const auto launch = [&](auto* kernel, int64_t tokens_per_block) {
      kernel<<<grid_blocks(num_tokens, tokens_per_block), kThreads, 0, stream>>>(
          static_cast<const scalar_t*>(z.data_ptr()), static_cast<const int64_t*>(ids.data_ptr()),
          num_tokens, options, static_cast<Acc*>(topk_weights.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (options.sigmoid || renormalize) {
      launch(&chosen_weights_kernel<scalar_t>, kThreads);
      return;
    }
    MOEOPS_DISPATCH_SLOTS(options.num_experts,
                          [&] { launch(&chosen_probs_kernel<scalar_t, kSlots>, kWarpsPerBlock); });
  });
  return topk_weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) { m.impl("chosen_weights", TORCH_BOX(&chosen_weights)); }

}  // namespace moeops::cuda
