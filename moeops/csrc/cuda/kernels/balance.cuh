// Top-k routing that also adds up what balance losses need. T tokens, E experts, K experts per
// token, B blocks. One warp owns one token at a time and keeps its own sums over the tokens in
// registers; lane l holds experts l, l + 32, l + 64, ..., as in routing.cuh.
#pragma once

#include <cmath>

#include "routing.cuh"
#include "scores.cuh"

namespace moeops {

// Whole multiprocessors that loop: every block ends with a row of partial sums, which one block
// adds up. Many experts need the registers of two threads.
constexpr int balance_threads(int slots) { return slots <= 4 ? 1024 : slots <= 8 ? 512 : 256; }

template <typename Acc>
__device__ __forceinline__ Acc warp_inclusive_scan(Acc value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Acc below = __shfl_up_sync(kFullMask, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

template <typename Acc, int kSlots>
__device__ __forceinline__ void divide(Acc (&values)[kSlots], const Acc* temperature) {
  if (temperature == nullptr) return;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) values[i] /= *temperature;
}

// A sample of the softmax over the experts that are not `taken`: the first one at which the
// cumulated probability exceeds `uniform`. share[i] is the softmax over all of them.
template <typename Acc, int kSlots>
__device__ __forceinline__ int sample_expert(const Acc (&z)[kSlots], const Acc (&share)[kSlots],
                                             uint64_t taken, int num_experts, Acc uniform) {
  const int lane = threadIdx.x % kWarpSize;
  Acc power[kSlots], sum = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    power[i] = taken >> i & 1 ? Acc(0) : share[i];
    sum += power[i];
  }
  sum = warp_sum(sum);
  if (sum < Acc(1e-20)) {  // what is left may have been rounded to 0: anew, relative to its best
    Acc top = Acc(-INFINITY);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool left = !(taken >> i & 1) && lane + i * kWarpSize < num_experts;
      if (left && z[i] > top) top = z[i];
    }
    top = warp_max(top);
    sum = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool left = !(taken >> i & 1) && lane + i * kWarpSize < num_experts;
      power[i] = left ? exp(z[i] - top) : Acc(0);
      sum += power[i];
    }
    sum = warp_sum(sum);
  }
  const Acc target = uniform * sum;
  Acc mass = 0;
  int expert = -1, last = 0;  // the last one with a probability, should rounding lead past it
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (expert < 0) {  // alike in all lanes
      const Acc upto = mass + warp_inclusive_scan(power[i]);
      const unsigned found = __ballot_sync(kFullMask, power[i] > 0 && upto > target);
      const unsigned possible = __ballot_sync(kFullMask, power[i] > 0);
      if (found != 0) expert = __ffs(found) - 1 + i * kWarpSize;
      if (possible != 0) last = kWarpSize - 1 - __clz(possible) + i * kWarpSize;
      mass = __shfl_sync(kFullMask, upto, kWarpSize - 1);
    }
  }
  return expert >= 0 ? expert : last;
}

// row[e] becomes the sum over the block's warps of their sums[e]. `tile` is shared memory,
// kWarpSize rows of kWarpSize + 1 values.
template <typename Acc, int kSlots>
__device__ __forceinline__ void add_up_warps(const Acc (&sums)[kSlots], int num_experts, Acc* tile,
                                             Acc* __restrict__ row) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    tile[warp * (kWarpSize + 1) + lane] = sums[i];
    __syncthreads();
    for (int column = warp; column < kWarpSize; column += warps) {
      const Acc total = warp_sum(lane < warps ? tile[lane * (kWarpSize + 1) + column] : Acc(0));
      const int e = column + i * kWarpSize;
      if (lane == 0 && e < num_experts) row[e] = total;
    }
    __syncthreads();
  }
}

// Shared memory: E integers, in whole 8-byte words; the tile of add_up_warps; what topk_route needs
// for each warp.
template <typename Acc>
__host__ __device__ inline size_t count_bytes(int num_experts) {
  return (num_experts + 1) / 2 * 2 * sizeof(int32_t);
}
template <typename Acc>
__host__ __device__ inline size_t balance_shared_bytes(int num_experts, int warps, int top_k,
                                                       int num_groups) {
  return count_bytes<Acc>(num_experts) + kWarpSize * (kWarpSize + 1) * sizeof(double) +
         warps * route_shared_bytes<Acc>(top_k, num_groups);
}

// Row B of the partial counts begins with add_up_balance_kernel's ticket, which the kernel before
// sets.
__device__ __forceinline__ void reset_ticket(int32_t* partial_counts, int num_experts) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    partial_counts[static_cast<int64_t>(gridDim.x) * num_experts] = 0;
  }
}

// Writes the block's rows of partial sums and counts, the warps' sums added up in `tile`.
template <typename Acc, int kSlots>
__device__ __forceinline__ void write_partials(const Acc (&sums)[kSlots], const int32_t* counts,
                                               int num_experts, Acc* tile, Acc* partial_sums,
                                               int32_t* partial_counts) {
  __syncthreads();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * num_experts;
  add_up_warps(sums, num_experts, tile, partial_sums + row);
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) partial_counts[row + e] = counts[e];
}

// Writes weights and ids, and a row of partial_sums and of partial_counts for each block. kByLogit
// as in topk_route_kernel; it also serves one group by the sum of its scores' shares, which among
// softmax scores are the scores.
template <typename T, int kSlots, bool kByLogit>
__global__ void __launch_bounds__(balance_threads(kSlots))
    topk_route_balance_kernel(const T* __restrict__ logits,
                              const device_accumulate_t<T>* __restrict__ bias,
                              const device_accumulate_t<T>* __restrict__ uniform,
                              const device_accumulate_t<T>* __restrict__ temperature,
                              int64_t num_tokens, RouteOptions route,
                              device_accumulate_t<T>* __restrict__ topk_weights,
                              int64_t* __restrict__ topk_ids,
                              device_accumulate_t<T>* __restrict__ partial_sums,
                              int32_t* __restrict__ partial_counts, int32_t* bad_values) {
  using Acc = device_accumulate_t<T>;
  using Key = decltype(order_key(Acc{}));
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int K = route.top_k, E = route.num_experts;
  auto* counts = reinterpret_cast<int32_t*>(shared);
  auto* tile = reinterpret_cast<Acc*>(shared + count_bytes<Acc>(E));
  unsigned char* mine = shared + count_bytes<Acc>(E) +
                        kWarpSize * (kWarpSize + 1) * sizeof(double) +
                        warp * route_shared_bytes<Acc>(K, route.num_groups);
  auto* chosen = reinterpret_cast<Acc*>(mine);  // logits if kByLogit, scores otherwise
  Acc* group_worth = chosen + K;
  auto* chosen_ids = reinterpret_cast<int32_t*>(group_worth + route.num_groups);
  // The block's counts and the lane's sums over tokens start at 0.
  for (int e = threadIdx.x; e < E; e += blockDim.x) counts[e] = 0;
  reset_ticket(partial_counts, E);
  __syncthreads();

  const bool limited = route.top_p < 1 || route.min_score > 0;
  Acc sums[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) sums[i] = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
  // The next token's logits travel while this one's are looked at.
  Acc next[kSlots];
  if (t < num_tokens) load_logits(logits + t * E, E, next);
  for (; t < num_tokens; t += stride) {
    Acc score[kSlots];  // logits if kByLogit
#pragma unroll
    for (int i = 0; i < kSlots; ++i) score[i] = next[i];
    if (t + stride < num_tokens) load_logits(logits + (t + stride) * E, E, next);
    divide(score, temperature);
    if (bad_values != nullptr) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (lane + i * kWarpSize < E && !isfinite(score[i])) atomicAdd(bad_values, 1);
      }
    }
    // Shares of all experts in the token's scores, which the sums take; keys of the logits.
    LaneCandidates<Key, kSlots> candidates;
    Acc top = 0, factor = 1;  // softmax = exp(logit - top) * factor
    Acc share[kSlots];        // of the scores; past the last expert 0
    Key best = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const Key key = lane + i * kWarpSize < E ? order_key(score[i]) : 0;
      if constexpr (kByLogit) candidates.keys[i] = key;
      best = key > best ? key : best;
      share[i] = score[i];
    }
    if (!route.sigmoid) {
      top = value_of_key(warp_max_key(best));
      Acc total = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        share[i] = exp(share[i] - top);
        total += share[i];
      }
      factor = Acc(1) / warp_sum(total);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) share[i] *= factor;
    } else {
      Acc slopes[kSlots];
      shares_from_logits<true, false>(share, slopes);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) sums[i] += share[i];
    // Keys of what is compared, without the experts of the groups that lost.
    if constexpr (kByLogit) {
      if (route.num_groups > 1) {
        keep_largest_group(share, candidates.keys, E, route.num_groups);
      }
    } else {
      if (route.sigmoid) {
        scores_from_logits(score, /*sigmoid=*/true);
      } else {
#pragma unroll
        for (int i = 0; i < kSlots; ++i) score[i] = share[i];
      }
      Acc choice[kSlots];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int e = lane + i * kWarpSize;
        choice[i] = e < E && bias != nullptr ? score[i] + bias[e] : score[i];
        candidates.keys[i] = e < E ? order_key(choice[i]) : 0;
      }
      if (route.num_groups > 1 && route.groups_by_sum) {
        keep_best_groups<true>(choice, candidates.keys, route, group_worth);
      } else if (route.num_groups > 1) {
        keep_best_groups(choice, candidates.keys, route, group_worth);
      }
    }
    // The best K, or K - 1 of them and a sample of the others.
    candidates.prepare();
    __syncwarp();  // the last token's choices were read
    const bool samples = kByLogit && uniform != nullptr;
    const uint64_t taken =
        choose_best<kByLogit>(candidates, score, samples ? K - 1 : K, E, chosen, chosen_ids);
    if constexpr (kByLogit) {
      if (samples) {
        const int expert = sample_expert(score, share, taken, E, uniform[t]);
        Acc own = 0;
#pragma unroll
        for (int i = 0; i < kSlots; ++i) own = i == expert / kWarpSize ? score[i] : own;
        if (lane == expert % kWarpSize) {
          chosen[K - 1] = own;
          chosen_ids[K - 1] = expert;
        }
      }
    }
    __syncwarp();

    // Scores of the chosen. A renormalised softmax may leave out the common divisor, unless its
    // scores are compared.
    if (kByLogit && !route.sigmoid && route.renormalize && !limited) {
      top = chosen[0];
      factor = 1;
    }
    const auto score_of = [&](int k) {
      if constexpr (!kByLogit) {
        return chosen[k];
      } else {
        return route.sigmoid ? Acc(1) / (Acc(1) + exp(-chosen[k])) : exp(chosen[k] - top) * factor;
      }
    };
    // How many of them stay: those before the mass is reached or the score too small.
    int kept = K;
    if (limited) {
      Acc mass = 0;
      for (int first = 0; first < K && kept == K; first += kWarpSize) {
        const int k = first + lane;
        const Acc own = k < K ? score_of(k) : Acc(0);
        const Acc upto = warp_inclusive_scan(own);
        const bool out = k > 0 && k < K &&
                         ((route.top_p < 1 && mass + upto - own >= static_cast<Acc>(route.top_p)) ||
                          own < static_cast<Acc>(route.min_score));
        const unsigned outs = __ballot_sync(kFullMask, out);
        if (outs != 0) kept = first + __ffs(outs) - 1;
        mass += __shfl_sync(kFullMask, upto, kWarpSize - 1);
      }
    }
    // Weights, ids and counts of those.
    Acc scale = static_cast<Acc>(route.scale);
    if (route.renormalize) {
      Acc sum = 0;
      for (int k = lane; k < kept; k += kWarpSize) sum += score_of(k);
      sum = warp_sum(sum);
      scale /= sum > smallest_normal<Acc>() ? sum : smallest_normal<Acc>();
    }
    for (int k = lane; k < K; k += kWarpSize) {
      topk_weights[t * K + k] = k < kept ? score_of(k) * scale : Acc(0);
      topk_ids[t * K + k] = k < kept ? chosen_ids[k] : -1;
      if (k < kept && k < route.num_counted) atomicAdd(&counts[chosen_ids[k]], 1);
    }
  }
  write_partials(sums, counts, E, tile, partial_sums, partial_counts);
}

// Adds up the rows of partial sums and of partial counts, [B, E] each, and computes the loss
// E * sum_e counts_e * sums_e / (T * sum_e counts_e). A block owns 32 experts, a lane one of them;
// its 32 warps share the rows. The block that ends last, of which `ticket` tells, computes the
// loss; the ticket is 0 before.
template <typename Acc>
__global__ void __launch_bounds__(1024)
    add_up_balance_kernel(const Acc* __restrict__ partial_sums,
                          const int32_t* __restrict__ partial_counts, int num_rows, int num_experts,
                          int64_t num_tokens, int32_t* ticket, Acc* sums, int32_t* counts,
                          Acc* __restrict__ loss) {
  __shared__ Acc sum_tile[kWarpSize][kWarpSize + 1];
  __shared__ int32_t count_tile[kWarpSize][kWarpSize + 1];
  __shared__ bool last;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int e = blockIdx.x * kWarpSize + lane;
  Acc sum = 0;
  int32_t count = 0;
  if (e < num_experts) {
#pragma unroll 4
    for (int row = warp; row < num_rows; row += kWarpSize) {
      sum += partial_sums[static_cast<int64_t>(row) * num_experts + e];
      count += partial_counts[static_cast<int64_t>(row) * num_experts + e];
    }
  }
  sum_tile[warp][lane] = sum;
  count_tile[warp][lane] = count;
  __syncthreads();
  sum = warp_sum(sum_tile[lane][warp]);
  count = __reduce_add_sync(kFullMask, count_tile[lane][warp]);
  const int owner = blockIdx.x * kWarpSize + warp;
  if (lane == 0 && owner < num_experts) {
    sums[owner] = sum;
    counts[owner] = count;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last || warp != 0) return;
  double dot = 0, total = 0;  // exact for all counts
  for (int i = lane; i < num_experts; i += kWarpSize) {
    const double number = __ldcg(&counts[i]);  // other blocks wrote it: not from this one's L1
    dot += number * static_cast<double>(__ldcg(&sums[i]));
    total += number;
  }
  dot = warp_sum(dot);
  total = warp_sum(total);
  if (lane == 0) {
    *loss = total > 0
                ? static_cast<Acc>(dot * num_experts / (static_cast<double>(num_tokens) * total))
                : static_cast<Acc>(dot * 0);  // NaN stays NaN
  }
}

// wanted[i] becomes the gradient of the sums, that of the loss included; each of them may be
// missing.
template <typename Acc, int kSlots>
__device__ __forceinline__ void balance_gradient(const Acc* __restrict__ grad_sums,
                                                 const Acc* __restrict__ grad_loss,
                                                 const int32_t* __restrict__ counts,
                                                 int64_t num_tokens, int num_experts,
                                                 Acc (&wanted)[kSlots]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    wanted[i] = grad_sums != nullptr && e < num_experts ? grad_sums[e] : Acc(0);
  }
  if (grad_loss != nullptr) {
    double total = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      total += e < num_experts ? counts[e] : 0;
    }
    total = warp_sum(total);
    const double factor = total > 0 ? num_experts / (static_cast<double>(num_tokens) * total) : 0.0;
    const Acc scaled = *grad_loss * static_cast<Acc>(factor);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e < num_experts) wanted[i] += scaled * static_cast<Acc>(counts[e]);
    }
  }
}

// The gradient of weights, sums and loss with respect to the logits of one token; each of them may
// be missing.
template <typename T, int kSlots, bool kSigmoid>
__global__ void __launch_bounds__(256)
    topk_route_balance_backward_kernel(const device_accumulate_t<T>* __restrict__ grad_topk_weights,
                                       const device_accumulate_t<T>* __restrict__ grad_sums,
                                       const device_accumulate_t<T>* __restrict__ grad_loss,
                                       const T* __restrict__ logits,
                                       const device_accumulate_t<T>* __restrict__ temperature,
                                       const int64_t* __restrict__ topk_ids,
                                       const int32_t* __restrict__ counts, int64_t num_tokens,
                                       RouteOptions options, T* __restrict__ grad_logits) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int E = options.num_experts, K = options.top_k;
  Acc wanted[kSlots];
  balance_gradient(grad_sums, grad_loss, counts, num_tokens, E, wanted);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t =
           static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       t < num_tokens; t += stride) {
    Acc share[kSlots], slopes[kSlots], grad[kSlots];
    load_logits(logits + t * E, E, share);
    divide(share, temperature);
    Acc score[kSlots];
    if constexpr (kSigmoid) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) score[i] = share[i];
      scores_from_logits(score, /*sigmoid=*/true);
    }
    shares_from_logits<kSigmoid, true>(share, slopes);
    if (grad_topk_weights == nullptr) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) grad[i] = 0;
    } else if constexpr (kSigmoid) {
      chosen_score_grads(score, grad_topk_weights + t * K, topk_ids + t * K, options, grad);
    } else {
      chosen_score_grads(share, grad_topk_weights + t * K, topk_ids + t * K, options, grad);
    }
    // Softmax shares are the scores, so that both gradients pass through one Jacobian.
    Acc mean = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      mean += share[i] * (kSigmoid ? wanted[i] : wanted[i] + grad[i]);
    }
    mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e >= E) continue;
      Acc dz;
      if constexpr (kSigmoid) {
        dz = share[i] * slopes[i] * (wanted[i] - mean) + grad[i] * score[i] * (Acc(1) - score[i]);
      } else {
        dz = share[i] * (wanted[i] + grad[i] - mean);
      }
      if (temperature != nullptr) dz /= *temperature;
      grad_logits[t * E + e] = from_accumulate<T>(dz);
    }
  }
}

}  // namespace moeops
