// Top-k routing. T tokens, E experts, K experts per token. One warp owns one token; see choice.cuh
// for what its lanes hold.
#pragma once

#include "choice.cuh"

namespace moeops {

// Shared memory per warp: top_k scores, top_k ids, num_groups group worths; whole 8-byte words keep
// the next warp's scores aligned.
template <typename Acc>
__host__ __device__ inline size_t route_shared_bytes(int top_k, int num_groups) {
  const size_t bytes = sizeof(Acc) * (top_k + num_groups) + sizeof(int32_t) * top_k;
  return (bytes + sizeof(double) - 1) / sizeof(double) * sizeof(double);
}

// kByLogit: without bias and groups the choice follows the logits, which are finer than their
// rounded scores; the score of the chosen is then computed from the key itself.
template <typename T, int kSlots, bool kByLogit>
__global__ void __launch_bounds__(256)
    topk_route_kernel(const T* __restrict__ logits, const device_accumulate_t<T>* __restrict__ bias,
                      int64_t num_tokens, RouteOptions options,
                      device_accumulate_t<T>* __restrict__ topk_weights,
                      int64_t* __restrict__ topk_ids, int32_t* bad_values) {
  using Acc = device_accumulate_t<T>;
  using Key = decltype(order_key(Acc{}));
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int K = options.top_k, E = options.num_experts;
  unsigned char* mine = shared + warp * route_shared_bytes<Acc>(K, options.num_groups);
  auto* chosen = reinterpret_cast<Acc*>(mine);  // logits if kByLogit, scores otherwise
  Acc* group_worth = chosen + K;
  auto* chosen_ids = reinterpret_cast<int32_t*>(group_worth + options.num_groups);

  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
  if (t >= num_tokens) return;
  Acc score[kSlots];
  load_logits(logits + t * E, E, score);
  if (bad_values != nullptr) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (lane + i * kWarpSize < E && !isfinite(score[i])) atomicAdd(bad_values, 1);
    }
  }
  LaneCandidates<Key, kSlots> candidates;
  if constexpr (kByLogit) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      candidates.keys[i] = lane + i * kWarpSize < E ? order_key(score[i]) : 0;
    }
  } else {
    scores_from_logits(score, options.sigmoid);
    Acc choice[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      choice[i] = e < E && bias != nullptr ? score[i] + bias[e] : score[i];
      candidates.keys[i] = e < E ? order_key(choice[i]) : 0;
    }
    if (options.num_groups > 1) {
      keep_best_groups(choice, candidates.keys, options, group_worth);
    }
  }
  candidates.prepare();

  choose_best<kByLogit>(candidates, score, K, E, chosen, chosen_ids);
  __syncwarp();

  Acc shift = 0, factor = 1;  // score = exp(logit - shift) * factor
  if (kByLogit && !options.sigmoid) {
    shift = chosen[0];
    if (!options.renormalize) {
      Acc total = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) total += exp(score[i] - shift);
      factor = Acc(1) / warp_sum(total);
    }
  }
  Acc sum = 0;
  for (int k = lane; k < K; k += kWarpSize) {
    if constexpr (kByLogit) {
      chosen[k] =
          options.sigmoid ? Acc(1) / (Acc(1) + exp(-chosen[k])) : exp(chosen[k] - shift) * factor;
    }
    sum += chosen[k];
  }
  Acc scale = static_cast<Acc>(options.scale);
  if (options.renormalize) {
    sum = warp_sum(sum);
    scale /= sum > smallest_normal<Acc>() ? sum : smallest_normal<Acc>();
  }
  for (int k = lane; k < K; k += kWarpSize) {
    topk_weights[t * K + k] = chosen[k] * scale;
    topk_ids[t * K + k] = chosen_ids[k];
  }
}

// grad[i] becomes the gradient of a token's weights with respect to the score of expert
// lane + 32 * i: 0 of those that were not chosen. Pairs with an id outside [0, E) have none.
template <typename Acc, int kSlots>
__device__ __forceinline__ void chosen_score_grads(const Acc (&score)[kSlots],
                                                   const Acc* __restrict__ grad_weights,
                                                   const int64_t* __restrict__ ids,
                                                   const RouteOptions& options,
                                                   Acc (&grad)[kSlots]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) grad[i] = 0;
  Acc sum = 0, dot = 0;  // of the chosen scores; of the incoming gradients with them
  for (int k = 0; k < options.top_k; ++k) {
    const int64_t e = ids[k];
    if (e < 0 || e >= options.num_experts) continue;
    const Acc g = grad_weights[k];
    Acc mine = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (e == lane + i * kWarpSize) {
        grad[i] = g;
        mine = score[i];
      }
    }
    const Acc chosen = __shfl_sync(kFullMask, mine, static_cast<int>(e % kWarpSize));
    sum += chosen;
    dot += g * chosen;
  }
  Acc factor = static_cast<Acc>(options.scale), shift = 0;
  if (options.renormalize) {
    const bool clamped = !(sum > smallest_normal<Acc>());
    sum = clamped ? smallest_normal<Acc>() : sum;
    factor /= sum;
    shift = clamped ? Acc(0) : dot / sum;
  }
  uint64_t chosen_bits = 0;
  for (int k = 0; k < options.top_k; ++k) {
    const int64_t e = ids[k];
    if (e >= 0 && e < options.num_experts && e % kWarpSize == lane) {
      chosen_bits |= uint64_t{1} << (e / kWarpSize);
    }
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (chosen_bits >> i & 1) grad[i] = factor * (grad[i] - shift);
  }
}

// The gradient of the chosen, renormalised, scaled scores with respect to all logits of one token.
template <typename T, int kSlots>
__global__ void __launch_bounds__(256)
    topk_route_backward_kernel(const device_accumulate_t<T>* __restrict__ grad_topk_weights,
                               const T* __restrict__ logits, const int64_t* __restrict__ topk_ids,
                               int64_t num_tokens, RouteOptions options,
                               T* __restrict__ grad_logits) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int E = options.num_experts, K = options.top_k;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t =
           static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       t < num_tokens; t += stride) {
    Acc score[kSlots], grad[kSlots];
    load_logits(logits + t * E, E, score);
    scores_from_logits(score, options.sigmoid);
    chosen_score_grads(score, grad_topk_weights + t * K, topk_ids + t * K, options, grad);
    Acc mean = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) mean += grad[i] * score[i];
    if (!options.sigmoid) mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e >= E) continue;
      const Acc dz =
          options.sigmoid ? grad[i] * score[i] * (Acc(1) - score[i]) : score[i] * (grad[i] - mean);
      grad_logits[t * E + e] = from_accumulate<T>(dz);
    }
  }
}

}  // namespace moeops
