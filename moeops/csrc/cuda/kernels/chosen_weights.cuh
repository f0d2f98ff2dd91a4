// Weights of experts that were chosen elsewhere. T tokens, E experts, K experts per token.
#pragma once

#include <cmath>

#include "routing.cuh"

namespace moeops {

// Weights of experts that were chosen elsewhere, by scores that need no other logits than those of
// the chosen: a renormalised softmax, or sigmoids. A thread owns a token; pairs with an id outside
// [0, E) get 0.
template <typename T>
__global__ void __launch_bounds__(256)
    chosen_weights_kernel(const T* __restrict__ logits, const int64_t* __restrict__ topk_ids,
                          int64_t num_tokens, RouteOptions options,
                          device_accumulate_t<T>* __restrict__ topk_weights) {
  using Acc = device_accumulate_t<T>;
  const int E = options.num_experts, K = options.top_k;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= num_tokens) return;
  Acc top = Acc(-INFINITY), sum = 0;
  for (int k = 0; k < K && !options.sigmoid; ++k) {
    const int64_t e = topk_ids[t * K + k];
    const Acc z = e >= 0 && e < E ? to_accumulate(logits[t * E + e]) : Acc(-INFINITY);
    top = z > top ? z : top;
  }
  const auto score_of = [&](int k) {
    const int64_t e = topk_ids[t * K + k];
    if (e < 0 || e >= E) return Acc(0);
    const Acc z = to_accumulate(logits[t * E + e]);
    return options.sigmoid ? Acc(1) / (Acc(1) + exp(-z)) : exp(z - top);
  };
  Acc scale = static_cast<Acc>(options.scale);
  if (options.renormalize) {
    for (int k = 0; k < K; ++k) sum += score_of(k);
    scale /= sum > smallest_normal<Acc>() ? sum : smallest_normal<Acc>();
  }
  for (int k = 0; k < K; ++k) topk_weights[t * K + k] = score_of(k) * scale;
}

// The same by the softmax over all experts. A warp owns a token.
template <typename T, int kSlots>
__global__ void __launch_bounds__(256)
    chosen_probs_kernel(const T* __restrict__ logits, const int64_t* __restrict__ topk_ids,
                        int64_t num_tokens, RouteOptions options,
                        device_accumulate_t<T>* __restrict__ topk_weights) {
  using Acc = device_accumulate_t<T>;
  const int E = options.num_experts, K = options.top_k;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (t >= num_tokens) return;
  Acc z[kSlots];
  load_logits(logits + t * E, E, z);
  Acc top = z[0], sum = 0;
#pragma unroll
  for (int i = 1; i < kSlots; ++i) top = z[i] > top ? z[i] : top;
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) sum += exp(z[i] - top);
  const Acc factor = static_cast<Acc>(options.scale) / warp_sum(sum);
  for (int k = lane; k < K; k += kWarpSize) {
    const int64_t e = topk_ids[t * K + k];
    const bool live = e >= 0 && e < E;
    topk_weights[t * K + k] = live ? exp(to_accumulate(logits[t * E + e]) - top) * factor : Acc(0);
  }
}

}  // namespace moeops
