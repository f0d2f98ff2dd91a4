// Host code that the routes with balance losses share: topk_route_balance, prototype_route and
// relu_route. Each is a file of its own, for the time that their many kernels take to compile.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common.h"
#include "device_dispatch.h"
#include "kernels/balance.cuh"

namespace moeops::cuda {

// One row of partial sums for 1024 threads: enough warps to keep a multiprocessor busy, and few
// rows to add up.
constexpr int64_t kThreadsPerSm = 1024;
constexpr int kBackwardThreads = 256;
constexpr int64_t kBackwardBlocksPerSm = 8;

// A tensor of the op's optional arguments as the kernels read it, in the accumulate type.
template <typename Acc>
const Acc* pointer_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const Acc*>(t->data_ptr()) : nullptr;
}

inline Tensor in_type_of(const Tensor& logits, const Tensor& grad) {
  if (grad.scalar_type() == logits.scalar_type()) return grad;
  return torch::stable::to(grad, logits.scalar_type());
}

inline unsigned backward_blocks(const Tensor& logits) {
  const int64_t most = kBackwardBlocksPerSm * device_limits(logits.get_device_index()).num_sms;
  return static_cast<unsigned>(
      std::min(ceil_div(logits.size(0), kBackwardThreads / kWarpSize), most));
}

inline void refuse_bad_logits(const char* op, DebugCounter& bad_values) {
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, op, ": logits must be finite, got NaN or infinity in ", bad,
                  " places. Look at the router's input and weights.");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The outputs of a route with K slots: weights, sums, loss, ids and counts; of no tokens all sums
// are 0. With tokens launch(kSlots, blocks, threads, partial_sums, partial_counts) runs the route,
// whose partial sums are added up here.
template <typename Acc, typename Launch>
Outputs add_up_route(const Tensor& logits, int64_t top_k, cudaStream_t stream,
                     const Launch& launch) {
  const ScalarType acc = accumulate_type(logits.scalar_type());
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  Tensor weights = empty_on(logits, {num_tokens, top_k}, acc);
  Tensor ids = empty_on(logits, {num_tokens, top_k}, ScalarType::Long);
  if (num_tokens == 0) {
    return {weights, torch::stable::new_zeros(logits, {num_experts}, acc),
            torch::stable::new_zeros(logits, {}, acc), ids,
            torch::stable::new_zeros(logits, {num_experts}, ScalarType::Int)};
  }
  Tensor sums = empty_on(logits, {num_experts}, acc);
  Tensor loss = empty_on(logits, {}, acc);
  Tensor counts = empty_on(logits, {num_experts}, ScalarType::Int);
  MOEOPS_DISPATCH_SLOTS(num_experts, [&] {
    constexpr int kThreads = balance_threads(kSlots), kWarps = kThreads / kWarpSize;
    const int64_t most = device_limits(logits.get_device_index()).num_sms *
                         std::max<int64_t>(1, kSlots <= 8 ? kThreadsPerSm / kThreads : 1);
    const auto blocks = static_cast<int>(std::min(ceil_div(num_tokens, kWarps), most));
    Tensor partial_sums = empty_on(logits, {blocks, num_experts}, acc);
    // One row more, for the ticket.
    Tensor partial_counts = empty_on(logits, {blocks + 1, num_experts}, ScalarType::Int);
    auto* rows_of_counts = static_cast<int32_t*>(partial_counts.data_ptr());
    launch(std::integral_constant<int, kSlots>{}, blocks, kThreads,
           static_cast<Acc*>(weights.data_ptr()), static_cast<int64_t*>(ids.data_ptr()),
           static_cast<Acc*>(partial_sums.data_ptr()), rows_of_counts);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    add_up_balance_kernel<Acc><<<ceil_div(num_experts, kWarpSize), 1024, 0, stream>>>(
        static_cast<const Acc*>(partial_sums.data_ptr()), rows_of_counts, blocks,
        static_cast<int>(num_experts), num_tokens, rows_of_counts + blocks * num_experts,
        static_cast<Acc*>(sums.data_ptr()), static_cast<int32_t*>(counts.data_ptr()),
        static_cast<Acc*>(loss.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {weights, sums, loss, ids, counts};
}

// What the kernels of prototype_route and relu_route take, and how they are launched.
template <typename T>
struct RouteForward {
  using Acc = T;
  const Acc* logits;
  int64_t num_tokens;
  int num_experts;
  Acc* weights;
  int64_t* ids;
  Acc* partial_sums;
  int32_t* partial_counts;
  int32_t* bad_values;
  int blocks, threads;
  size_t shared_bytes;
  cudaStream_t stream;
};

// A route without options, of checked arguments: launch(kSlots, RouteForward) starts its kernel.
template <typename Launch>
Outputs run_route(const char* op, const Tensor& logits, int64_t top_k, const Launch& launch) {
  check_register_experts(op, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_accumulate(logits);
  const int num_experts = static_cast<int>(z.size(1));
  Outputs outputs;
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    outputs = add_up_route<Acc>(
        z, top_k, stream,
        [&](auto slots, int blocks, int threads, Acc* weights, int64_t* ids, Acc* partial_sums,
            int32_t* partial_counts) {
          launch(slots, RouteForward<Acc>{static_cast<const Acc*>(z.data_ptr()), z.size(0),
                                          num_experts, weights, ids, partial_sums, partial_counts,
                                          bad_values.device_pointer(), blocks, threads,
                                          balance_shared_bytes<Acc>(num_experts, 0, 0, 0), stream});
        });
  });
  refuse_bad_logits(op, bad_values);
  return outputs;
}

// The same for their backwards; gradients that are missing are null pointers.
template <typename T>
struct RouteBackward {
  using Acc = T;
  const Acc* grad_weights;
  const Acc* grad_sums;
  const Acc* grad_loss;
  const Acc* logits;
  const int32_t* counts;
  int64_t num_tokens;
  int num_experts;
  Acc* grad_logits;
  unsigned blocks;
  cudaStream_t stream;
};

// The logits' gradient, of checked arguments: launch(kSlots, RouteBackward) starts the kernel.
template <typename Launch>
Tensor run_route_backward(const char* op, const std::optional<Tensor>& grad_topk_weights,
                          const std::optional<Tensor>& grad_sums,
                          const std::optional<Tensor>& grad_loss, const Tensor& logits,
                          const Tensor& tokens_per_expert, const Launch& launch) {
  check_register_experts(op, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  Tensor grad_logits = empty_on(logits, logits.sizes(), accumulate_type(logits.scalar_type()));
  if (logits.size(0) == 0) return in_type_of(logits, grad_logits);
  const std::optional<Tensor> grad_weights = contiguous_or_none(grad_topk_weights),
                              grad_shares = contiguous_or_none(grad_sums);
  const Tensor z = as_accumulate(logits), counts = as_contiguous(tokens_per_expert);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(z.size(1), [&] {
      launch(
          std::integral_constant<int, kSlots>{},
          RouteBackward<Acc>{pointer_or_null<Acc>(grad_weights), pointer_or_null<Acc>(grad_shares),
                             pointer_or_null<Acc>(grad_loss), static_cast<const Acc*>(z.data_ptr()),
                             static_cast<const int32_t*>(counts.data_ptr()), z.size(0),
                             static_cast<int>(z.size(1)), static_cast<Acc*>(grad_logits.data_ptr()),
                             backward_blocks(z), current_stream(logits)});
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return in_type_of(logits, grad_logits);
}

// A launch of topk_route_balance_kernel; the pointers may be null where the kernel's may.
template <typename Acc>
struct BalanceForward {
  const Acc* logits;
  const Acc* bias;
  const Acc* uniform;
  const Acc* temperature;
  int64_t num_tokens;
  RouteOptions options;
  int blocks, threads;
  Acc* weights;
  int64_t* ids;
  Acc* partial_sums;
  int32_t* partial_counts;
  int32_t* bad_values;
  cudaStream_t stream;
};

// Defined in the files balance_forward_*.cu; kByLogit as in the kernel.
template <typename Acc, bool kByLogit>
void launch_balance_forward(const BalanceForward<Acc>& forward);

}  // namespace moeops::cuda
