// topk_route, topk_route_backward and chosen_weights on CUDA.
#include <torch/csrc/stable/library.h>

#include "common.h"
#include "device_dispatch.h"
#include "kernels/chosen_weights.cuh"
#include "kernels/routing.cuh"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarpSize;
// topk_route_backward_kernel keeps a lane's chosen experts as bits of one word.
static_assert(kMaxSlots <= 64, "one bit for each register of a lane");

RouteOptions make_options(const char* op, int64_t num_experts, int64_t top_k,
                          const std::string& score, bool renormalize, double scale,
                          int64_t num_groups, int64_t top_groups) {
  check_route_options(op, num_experts, top_k, score, num_groups, top_groups);
  check_register_experts(op, num_experts);
  return {static_cast<int>(num_experts),
          static_cast<int>(top_k),
          static_cast<int>(num_groups),
          static_cast<int>(top_groups),
          score == "sigmoid",
          renormalize,
          scale};
}

std::tuple<Tensor, Tensor> topk_route(const Tensor& logits, const std::optional<Tensor>& bias,
                                      int64_t top_k, const std::string& score, bool renormalize,
                                      double scale, int64_t num_groups, int64_t top_groups) {
  constexpr auto kOp = "topk_route";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  const auto options =
      make_options(kOp, logits.size(1), top_k, score, renormalize, scale, num_groups, top_groups);
  DeviceGuard guard(logits.get_device_index());
  const ScalarType acc = accumulate_type(logits.scalar_type());
  std::optional<Tensor> shift;
  if (bias) {
    check_dim(kOp, "bias", *bias, 1);
    check_float(kOp, "bias", *bias);
    check_size(kOp, "bias", *bias, 0, logits.size(1));
    check_same_device(kOp, "bias", *bias, logits);
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
    MOEOPS_DISPATCH_SLOTS(options.num_experts, [&] {
      auto* kernel = bias || options.num_groups > 1 ? &topk_route_kernel<scalar_t, kSlots, false>
                                                    : &topk_route_kernel<scalar_t, kSlots, true>;
      const size_t shared =
          kWarpsPerBlock * route_shared_bytes<Acc>(options.top_k, options.num_groups);
      allow_shared_bytes(kernel, shared);
      kernel<<<grid_blocks(num_tokens, kWarpsPerBlock), kThreads, shared, stream>>>(
          static_cast<const scalar_t*>(z.data_ptr()),
          shift ? static_cast<const Acc*>(shift->data_ptr()) : nullptr, num_tokens, options,
          static_cast<Acc*>(topk_weights.data_ptr()), static_cast<int64_t*>(topk_ids.data_ptr()),
          bad_values.device_pointer());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, kOp, ": logits must be finite, got NaN or infinity in ", bad,
                  " places. Look at the router's input and weights.");
  return {topk_weights, topk_ids};
}

Tensor topk_route_backward(const Tensor& grad_topk_weights, const Tensor& logits,
                           const Tensor& topk_ids, const std::string& score, bool renormalize,
                           double scale) {
  constexpr auto kOp = "topk_route_backward";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  check_ids(kOp, topk_ids);
  check_type(kOp, "topk_ids", topk_ids, ScalarType::Long, "int64");
  check_same_device(kOp, "topk_ids", topk_ids, logits);
  check_size(kOp, "topk_ids", topk_ids, 0, logits.size(0));
  check_dim(kOp, "grad_topk_weights", grad_topk_weights, 2);
  check_size(kOp, "grad_topk_weights", grad_topk_weights, 0, topk_ids.size(0));
  check_size(kOp, "grad_topk_weights", grad_topk_weights, 1, topk_ids.size(1));
  check_type(kOp, "grad_topk_weights", grad_topk_weights, accumulate_type(logits.scalar_type()),
             "float32 (float64 for float64 logits)");
  check_same_device(kOp, "grad_topk_weights", grad_topk_weights, logits);
  const auto options = make_options(kOp, logits.size(1), topk_ids.size(1), score, renormalize,
                                    scale, /*num_groups=*/1, /*top_groups=*/1);
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

Tensor chosen_weights(const Tensor& logits, const Tensor& topk_ids, const std::string& score,
                      bool renormalize, double scale) {
  constexpr auto kOp = "chosen_weights";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_score(kOp, score);
  check_register_experts(kOp, logits.size(1));
  const RouteOptions options{static_cast<int>(logits.size(1)),
                             static_cast<int>(topk_ids.size(1)),
                             /*num_groups=*/1,
                             /*top_groups=*/1,
                             score == "sigmoid",
                             renormalize,
                             scale};
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

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("topk_route", TORCH_BOX(&topk_route));
  m.impl("topk_route_backward", TORCH_BOX(&topk_route_backward));
  m.impl("chosen_weights", TORCH_BOX(&chosen_weights));
}

}  // namespace moeops::cuda
