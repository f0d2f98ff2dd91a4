// Every expert with a positive logit, weighted by it. T tokens, E experts. One warp owns one token
// at a time; lane l holds experts l, l + 32, l + 64, ...
#pragma once

#include "balance.cuh"

namespace moeops {

// Writes weights and ids, and a row of partial_sums and of partial_counts for each block. Shared
// memory: the tile of add_up_warps, and E integers.
template <typename T, int kSlots>
__global__ void __launch_bounds__(balance_threads(kSlots))
    relu_route_kernel(const T* __restrict__ logits, int64_t num_tokens, int num_experts,
                      device_accumulate_t<T>* __restrict__ topk_weights,
                      int64_t* __restrict__ topk_ids,
                      device_accumulate_t<T>* __restrict__ partial_sums,
                      int32_t* __restrict__ partial_counts, int32_t* bad_values) {
  using Acc = device_accumulate_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* counts = reinterpret_cast<int32_t*>(shared);
  auto* tile = reinterpret_cast<Acc*>(shared + count_bytes<Acc>(num_experts));
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) counts[e] = 0;
  reset_ticket(partial_counts, num_experts);
  __syncthreads();
  Acc sums[kSlots];
  int32_t own_counts[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    sums[i] = 0;
    own_counts[i] = 0;
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
       t < num_tokens; t += stride) {
    Acc z[kSlots];
    load_logits(logits + t * num_experts, num_experts, z);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e >= num_experts) continue;
      if (bad_values != nullptr && !isfinite(z[i])) atomicAdd(bad_values, 1);
      const bool positive = z[i] > 0;
      const Acc weight = z[i] <= 0 ? Acc(0) : z[i];  // NaN stays NaN
      topk_weights[t * num_experts + e] = weight;
      topk_ids[t * num_experts + e] = positive ? e : -1;
      sums[i] += weight;
      own_counts[i] += positive;
    }
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    if (e < num_experts && own_counts[i] != 0) atomicAdd(&counts[e], own_counts[i]);
  }
  write_partials(sums, counts, num_experts, tile, partial_sums, partial_counts);
}

// The gradient of weights, sums and loss, each of which may be missing.
template <typename T, int kSlots>
__global__ void __launch_bounds__(256)
    relu_route_backward_kernel(const device_accumulate_t<T>* __restrict__ grad_topk_weights,
                               const device_accumulate_t<T>* __restrict__ grad_sums,
                               const device_accumulate_t<T>* __restrict__ grad_loss,
                               const T* __restrict__ logits, const int32_t* __restrict__ counts,
                               int64_t num_tokens, int num_experts, T* __restrict__ grad_logits) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  Acc wanted[kSlots];
  balance_gradient(grad_sums, grad_loss, counts, num_tokens, num_experts, wanted);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t =
           static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       t < num_tokens; t += stride) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e >= num_experts) continue;
      const int64_t at = t * num_experts + e;
      const Acc own = grad_topk_weights != nullptr ? grad_topk_weights[at] : Acc(0);
      const bool positive = to_accumulate(logits[at]) > 0;
      grad_logits[at] = from_accumulate<T>(positive ? own + wanted[i] : Acc(0));
    }
  }
}

}  // namespace moeops
