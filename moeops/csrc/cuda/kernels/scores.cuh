// Sums of the experts' scores over the tokens. T tokens, E experts, B blocks. One warp owns one
// token at a time; lane l holds experts l, l + 32, l + 64, ... in registers, as in routing.cuh.
#pragma once

#include <cmath>

#include "routing.cuh"

namespace moeops {

// z[i], the logit of expert lane + 32 * i, becomes the share of its score; with kSlopes slopes[i]
// becomes the derivative of log score. Lanes past the last expert hold -infinity before, 0 after.
template <bool kSigmoid, bool kSlopes, typename Acc, int kSlots>
__device__ __forceinline__ void shares_from_logits(Acc (&z)[kSlots], Acc (&slopes)[kSlots]) {
  Acc top = z[0];
#pragma unroll
  for (int i = 1; i < kSlots; ++i) top = z[i] > top ? z[i] : top;
  top = warp_max(top);
  // sigmoid(z) = exp(min(z, 0)) / (1 + exp(-|z|)), taken relative to exp(min(top, 0)): the largest
  // is at least 1 / 2, so that nothing is divided by zero.
  if (kSigmoid && top > 0) top = 0;
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if constexpr (kSigmoid) {
      const bool above = z[i] > 0;
      const Acc power = exp(above ? -z[i] : z[i]);
      const Acc share = Acc(1) / (Acc(1) + power);
      if constexpr (kSlopes) slopes[i] = above ? power * share : share;
      // The second exponential only where all logits of the token are negative.
      z[i] = (above ? Acc(1) : top < 0 ? exp(z[i] - top) : power) * share;
    } else {
      z[i] = exp(z[i] - top);
    }
    sum += z[i];
  }
  const Acc factor = Acc(1) / warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) z[i] *= factor;
}

// partial[block] becomes the sums over the tokens of the block's warps. Shared memory: half as many
// rows of E values as there are warps, a power of two.
template <typename T, int kSlots, bool kSigmoid>
__global__ void __launch_bounds__(256)
    score_sums_kernel(const T* __restrict__ logits, int64_t num_tokens, int num_experts,
                      device_accumulate_t<T>* __restrict__ partial) {
  using Acc = device_accumulate_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* rows = reinterpret_cast<Acc*>(shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  Acc sums[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) sums[i] = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + warp; t < num_tokens; t += stride) {
    Acc z[kSlots], slopes[kSlots];
    load_logits(logits + t * num_experts, num_experts, z);
    shares_from_logits<kSigmoid, false>(z, slopes);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) sums[i] += z[i];
  }
  // The upper half of the warps hands its sums to the lower half, until one warp holds all.
  for (int half = warps / 2; half > 0; half /= 2) {
    const bool gives = warp >= half && warp < 2 * half;
    Acc* row = rows + static_cast<int64_t>(gives ? warp - half : warp) * num_experts;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (gives && e < num_experts) row[e] = sums[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (warp < half && e < num_experts) sums[i] += row[e];
    }
    __syncthreads();
  }
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    if (e < num_experts) partial[static_cast<int64_t>(blockIdx.x) * num_experts + e] = sums[i];
  }
}

// sums[e] = sum over the rows of partial [B, E]. A block owns 32 experts, a lane one of them; its
// 32 warps share the rows.
template <typename Acc>
__global__ void __launch_bounds__(1024)
    add_partial_sums_kernel(const Acc* __restrict__ partial, int num_rows, int num_experts,
                            Acc* __restrict__ sums) {
  __shared__ Acc tile[kWarpSize][kWarpSize + 1];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int e = blockIdx.x * kWarpSize + lane;
  Acc sum = 0;
  if (e < num_experts) {
#pragma unroll 8
    for (int row = warp; row < num_rows; row += kWarpSize) {
      sum += partial[static_cast<int64_t>(row) * num_experts + e];
    }
  }
  tile[warp][lane] = sum;
  __syncthreads();
  const Acc total = warp_sum(tile[lane][warp]);
  const int owner = blockIdx.x * kWarpSize + warp;
  if (lane == 0 && owner < num_experts) sums[owner] = total;
}

// With shares q and slopes d: grad_z = q * d * (g - <g, q>); softmax has d = 1.
template <typename T, int kSlots, bool kSigmoid>
__global__ void __launch_bounds__(256)
    score_sums_backward_kernel(const device_accumulate_t<T>* __restrict__ grad_sums,
                               const T* __restrict__ logits, int64_t num_tokens, int num_experts,
                               T* __restrict__ grad_logits) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = blockDim.x / kWarpSize;
  for (int64_t t = blockIdx.x * warps + threadIdx.x / kWarpSize; t < num_tokens;
       t += gridDim.x * warps) {
    Acc z[kSlots], slopes[kSlots];
    load_logits(logits + t * num_experts, num_experts, z);
    shares_from_logits<kSigmoid, true>(z, slopes);
    Acc mean = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e < num_experts) mean += grad_sums[e] * z[i];
    }
    mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e >= num_experts) continue;
      const Acc grad = z[i] * (grad_sums[e] - mean);
      grad_logits[t * num_experts + e] = from_accumulate<T>(kSigmoid ? grad * slopes[i] : grad);
    }
  }
}

// groups[i] becomes the group of expert lane + 32 * i, -1 past the last one.
template <int kSlots>
__device__ __forceinline__ void group_slots(int num_experts, int experts_per_group,
                                            int (&groups)[kSlots]) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = static_cast<int>(threadIdx.x % kWarpSize) + i * kWarpSize;
    groups[i] = e < num_experts ? e / experts_per_group : -1;
  }
}

// What the experts outside the group of a token's first choice have above its last choice. Choices
// outside [0, E) have no group.
template <typename Acc, int kSlots>
struct Excess {
  Acc of[kSlots];  // of the lane's experts; NaN stays NaN
  Acc above;       // how many have any, in the whole warp
  int last;        // the last choice

  // `share` holds probabilities, `groups` is what group_slots found.
  __device__ __forceinline__ bool find(const Acc (&share)[kSlots], const int (&groups)[kSlots],
                                       int64_t first_id, int64_t last_id, int num_experts,
                                       int experts_per_group) {
    if (first_id < 0 || first_id >= num_experts || last_id < 0 || last_id >= num_experts) {
      return false;
    }
    last = static_cast<int>(last_id);
    const int group = static_cast<int>(first_id) / experts_per_group;
    Acc mine = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) mine = i == last / kWarpSize ? share[i] : mine;
    const Acc mark = __shfl_sync(kFullMask, mine, last % kWarpSize);
    int count = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const Acc more = share[i] - mark;
      of[i] = groups[i] >= 0 && groups[i] != group && !(more <= 0) ? more : Acc(0);
      count += of[i] > 0;
    }
    above = static_cast<Acc>(__reduce_add_sync(kFullMask, count));
    return true;
  }
};

// partial[block] becomes the excess of the tokens of the block's warps.
template <typename T, int kSlots>
__global__ void __launch_bounds__(256)
    alignment_sum_kernel(const T* __restrict__ logits, const int64_t* __restrict__ topk_ids,
                         int64_t num_tokens, int top_k, int num_experts, int experts_per_group,
                         device_accumulate_t<T>* __restrict__ partial) {
  using Acc = device_accumulate_t<T>;
  __shared__ Acc warp_sums[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t warps = blockDim.x / kWarpSize;
  int groups[kSlots];
  group_slots(num_experts, experts_per_group, groups);
  Acc sum = 0;
  for (int64_t t = blockIdx.x * warps + warp; t < num_tokens; t += gridDim.x * warps) {
    // Read with the logits, not after them.
    const int64_t first_id = topk_ids[t * top_k], last_id = topk_ids[t * top_k + top_k - 1];
    Acc share[kSlots], slopes[kSlots];
    load_logits(logits + t * num_experts, num_experts, share);
    shares_from_logits<false, false>(share, slopes);
    Excess<Acc, kSlots> excess;
    if (!excess.find(share, groups, first_id, last_id, num_experts, experts_per_group)) continue;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) sum += excess.of[i];
  }
  sum = warp_sum(sum);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  sum = warp_sum(lane < warps ? warp_sums[lane] : Acc(0));
  if (lane == 0) partial[blockIdx.x] = sum;
}

// *sum = the sum of `partial`, by one block.
template <typename Acc>
__global__ void __launch_bounds__(1024)
    add_block_sums_kernel(const Acc* __restrict__ partial, int num_blocks, Acc* __restrict__ sum) {
  __shared__ Acc warp_sums[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  Acc own = 0;
  for (int block = threadIdx.x; block < num_blocks; block += blockDim.x) own += partial[block];
  own = warp_sum(own);
  if (lane == 0) warp_sums[warp] = own;
  __syncthreads();
  if (warp != 0) return;
  own = warp_sum(lane < static_cast<int>(blockDim.x / kWarpSize) ? warp_sums[lane] : Acc(0));
  if (lane == 0) *sum = own;
}

template <typename T, int kSlots>
__global__ void __launch_bounds__(256)
    alignment_sum_backward_kernel(const device_accumulate_t<T>* __restrict__ grad_sum,
                                  const T* __restrict__ logits,
                                  const int64_t* __restrict__ topk_ids, int64_t num_tokens,
                                  int top_k, int num_experts, int experts_per_group,
                                  T* __restrict__ grad_logits) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps = blockDim.x / kWarpSize;
  int groups[kSlots];
  group_slots(num_experts, experts_per_group, groups);
  for (int64_t t = blockIdx.x * warps + threadIdx.x / kWarpSize; t < num_tokens;
       t += gridDim.x * warps) {
    const int64_t first_id = topk_ids[t * top_k], last_id = topk_ids[t * top_k + top_k - 1];
    Acc share[kSlots], slopes[kSlots];
    load_logits(logits + t * num_experts, num_experts, share);
    shares_from_logits<false, false>(share, slopes);
    Excess<Acc, kSlots> excess;
    const bool counts =
        excess.find(share, groups, first_id, last_id, num_experts, experts_per_group);
    // The gradient with respect to the probabilities is 1 where there is an excess and minus their
    // number at the last choice; its mean under the probabilities is the excess itself.
    Acc mean = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) mean += counts ? excess.of[i] : Acc(0);
    mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e >= num_experts) continue;
      Acc slope = 0;
      if (counts) slope = e == excess.last ? -excess.above : Acc(excess.of[i] > 0);
      const Acc grad = counts ? *grad_sum * share[i] * (slope - mean) : Acc(0);
      grad_logits[t * num_experts + e] = from_accumulate<T>(grad);
    }
  }
}

}  // namespace moeops
