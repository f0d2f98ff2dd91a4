// The best expert of each group, weighted by the softmax over its group. T tokens, E experts in K
// equal groups of neighbours. One warp owns one token at a time; lane l holds experts l, l + 32, l
// + 64, ...
#pragma once

#include <cmath>

#include "balance.cuh"

namespace moeops {

// Whether one of the lanes' experts in register i is in [begin, end).
__device__ __forceinline__ bool register_meets(int i, int begin, int end) {
  return begin < (i + 1) * kWarpSize && end > i * kWarpSize;
}

// share[i] of the group's experts becomes their softmax; returns the best of them, and its share.
template <typename Acc, int kSlots>
__device__ __forceinline__ int group_softmax(Acc (&share)[kSlots], int begin, int end,
                                             Acc& best_share) {
  const int lane = threadIdx.x % kWarpSize;
  const auto member = [&](int i) {
    const int e = lane + i * kWarpSize;
    return e >= begin && e < end;
  };
  using Key = decltype(order_key(Acc{}));
  Key best = 0;
  int mine = end;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (!register_meets(i, begin, end)) continue;
    const Key key = member(i) ? order_key(share[i]) : 0;
    if (key > best) {  // strict: the lower id stays
      best = key;
      mine = lane + i * kWarpSize;
    }
  }
  const Key top_key = warp_max_key(best);
  const int expert = __reduce_min_sync(kFullMask, best == top_key ? mine : end);
  const Acc top = value_of_key(top_key);
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (!register_meets(i, begin, end)) continue;
    if (member(i)) {
      share[i] = exp(share[i] - top);
      sum += share[i];
    }
  }
  best_share = Acc(1) / warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (register_meets(i, begin, end) && member(i)) share[i] *= best_share;
  }
  return expert;
}

// Writes weights and ids, and a row of partial_sums and of partial_counts for each block. Shared
// memory: E integers, in whole 8-byte words, and the tile of add_up_warps.
template <typename T, int kSlots>
__global__ void __launch_bounds__(balance_threads(kSlots))
    prototype_route_kernel(const T* __restrict__ logits, int64_t num_tokens, int num_experts,
                           int num_groups, device_accumulate_t<T>* __restrict__ topk_weights,
                           int64_t* __restrict__ topk_ids,
                           device_accumulate_t<T>* __restrict__ partial_sums,
                           int32_t* __restrict__ partial_counts, int32_t* bad_values) {
  using Acc = device_accumulate_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* counts = reinterpret_cast<int32_t*>(shared);
  auto* tile = reinterpret_cast<Acc*>(shared + count_bytes<Acc>(num_experts));
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int size = num_experts / num_groups;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) counts[e] = 0;
  reset_ticket(partial_counts, num_experts);
  __syncthreads();
  Acc sums[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) sums[i] = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
       t < num_tokens; t += stride) {
    Acc share[kSlots];
    load_logits(logits + t * num_experts, num_experts, share);
    if (bad_values != nullptr) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (lane + i * kWarpSize < num_experts && !isfinite(share[i])) atomicAdd(bad_values, 1);
      }
    }
    for (int g = 0; g < num_groups; ++g) {
      Acc best_share;
      const int expert = group_softmax(share, g * size, (g + 1) * size, best_share);
      if (lane == g % kWarpSize) {
        topk_weights[t * num_groups + g] = best_share;
        topk_ids[t * num_groups + g] = expert;
        if (expert < num_experts) atomicAdd(&counts[expert], 1);  // it is, unless a logit is NaN
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      sums[i] += lane + i * kWarpSize < num_experts ? share[i] : Acc(0);
  }
  write_partials(sums, counts, num_experts, tile, partial_sums, partial_counts);
}

// The gradient of weights, sums and loss, each of which may be missing.
template <typename T, int kSlots>
__global__ void __launch_bounds__(256)
    prototype_route_backward_kernel(const device_accumulate_t<T>* __restrict__ grad_topk_weights,
                                    const device_accumulate_t<T>* __restrict__ grad_sums,
                                    const device_accumulate_t<T>* __restrict__ grad_loss,
                                    const T* __restrict__ logits,
                                    const int64_t* __restrict__ topk_ids,
                                    const int32_t* __restrict__ counts, int64_t num_tokens,
                                    int num_experts, int num_groups, T* __restrict__ grad_logits) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int size = num_experts / num_groups;
  Acc wanted[kSlots];
  balance_gradient(grad_sums, grad_loss, counts, num_tokens, num_experts, wanted);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t =
           static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       t < num_tokens; t += stride) {
    Acc share[kSlots];
    load_logits(logits + t * num_experts, num_experts, share);
    for (int g = 0; g < num_groups; ++g) {
      const int begin = g * size, end = begin + size;
      Acc best_share;
      group_softmax(share, begin, end, best_share);
      const int64_t chosen = topk_ids[t * num_groups + g];
      const Acc own = grad_topk_weights != nullptr ? grad_topk_weights[t * num_groups + g] : Acc(0);
      const auto grad_of = [&](int i) {
        return wanted[i] + (chosen == lane + i * kWarpSize ? own : Acc(0));
      };
      const auto member = [&](int i) {
        const int e = lane + i * kWarpSize;
        return e >= begin && e < end;
      };
      Acc mean = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (register_meets(i, begin, end) && member(i)) mean += share[i] * grad_of(i);
      }
      mean = warp_sum(mean);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (register_meets(i, begin, end) && member(i)) {
          grad_logits[t * num_experts + lane + i * kWarpSize] =
              from_accumulate<T>(share[i] * (grad_of(i) - mean));
        }
      }
    }
  }
}

}  // namespace moeops
