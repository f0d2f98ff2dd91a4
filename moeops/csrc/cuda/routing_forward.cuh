// The launch of topk_route_kernel, whose variants are compiled in files of their own.
#pragma once

#include "common.h"
#include "device_dispatch.h"
#include "kernels/routing.cuh"

namespace moeops::cuda {

// choose_best and chosen_score_grads keep a lane's chosen experts as bits of one word.
static_assert(kMaxSlots <= 64, "one bit for each register of a lane");

// The arguments of topk_route_kernel; no bias and no debug checks are null pointers.
template <typename T>
struct TopkRoute {
  const T* logits;
  const device_accumulate_t<T>* bias;
  int64_t num_tokens;
  RouteOptions options;
  device_accumulate_t<T>* weights;
  int64_t* ids;
  int32_t* bad_values;
  cudaStream_t stream;
};

template <typename T, bool kByLogit>
void launch_topk_route(const TopkRoute<T>& r) {
  constexpr int kThreads = 256, kWarpsPerBlock = kThreads / kWarpSize;
  MOEOPS_DISPATCH_SLOTS(r.options.num_experts, [&] {
    auto* kernel = &topk_route_kernel<T, kSlots, kByLogit>;
    const size_t shared = kWarpsPerBlock * route_shared_bytes<device_accumulate_t<T>>(
                                               r.options.top_k, r.options.num_groups);
    allow_shared_bytes(kernel, shared);
    kernel<<<grid_blocks(r.num_tokens, kWarpsPerBlock), kThreads, shared, r.stream>>>(
        r.logits, r.bias, r.num_tokens, r.options, r.weights, r.ids, r.bad_values);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace moeops::cuda
