// Top-k routing by noisy logits, with the importance and the load of every expert. T tokens, E
// experts, K experts per token, B blocks. One warp owns one token at a time and keeps its own sums
// over the tokens in registers; lane l holds experts l, l + 32, l + 64, ..., as in routing.cuh.
#pragma once

#include <cmath>

#include "balance.cuh"

namespace moeops {

struct NoisyShape {
  int64_t num_tokens;
  int num_experts;
  int top_k;
  double min_noise;
};

// The numbers of one token: clean and noisy logits, noise and its standard deviation. Lanes past
// the last expert hold noisy logits of -infinity and a deviation of 1.
template <typename Acc, int kSlots>
struct NoisyLogits {
  Acc clean[kSlots], noisy[kSlots], noise[kSlots], sigma[kSlots];

  template <typename T>
  __device__ __forceinline__ void load(const T* clean_row, const T* spread_row, const T* noise_row,
                                       int num_experts, Acc min_noise, Acc (&spread)[kSlots]) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      const bool inside = e < num_experts;
      clean[i] = inside ? to_accumulate(clean_row[e]) : Acc(0);
      spread[i] = inside ? to_accumulate(spread_row[e]) : Acc(0);
      noise[i] = inside ? to_accumulate(noise_row[e]) : Acc(0);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool inside = lane + i * kWarpSize < num_experts;
      // softplus
      const Acc above = spread[i] > 0 ? spread[i] : Acc(0);
      const Acc size = spread[i] > 0 ? spread[i] : -spread[i];
      sigma[i] = inside ? above + log1p(exp(-size)) + min_noise : Acc(1);
      noisy[i] = inside ? clean[i] + noise[i] * sigma[i] : Acc(-INFINITY);
    }
  }
};

// Writes weights, ids and the best expert that was left out (-1 with K = E), and for each block a
// row of partial sums [2, E]: importance and load.
template <typename T, int kSlots>
__global__ void __launch_bounds__(balance_threads(kSlots))
    noisy_topk_route_kernel(const T* __restrict__ clean, const T* __restrict__ spread,
                            const T* __restrict__ noise, NoisyShape shape,
                            device_accumulate_t<T>* __restrict__ topk_weights,
                            int64_t* __restrict__ topk_ids, int64_t* __restrict__ runner_up,
                            device_accumulate_t<T>* __restrict__ partial, int32_t* ticket,
                            int32_t* bad_values) {
  using Acc = device_accumulate_t<T>;
  using Key = decltype(order_key(Acc{}));
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int K = shape.top_k, E = shape.num_experts;
  const int ranks = K < E ? K + 1 : K;
  auto* tile = reinterpret_cast<Acc*>(shared);
  unsigned char* mine = shared + kWarpSize * (kWarpSize + 1) * sizeof(double) +
                        warp * route_shared_bytes<Acc>(K + 1, 0);
  auto* chosen = reinterpret_cast<Acc*>(mine);  // noisy logits
  auto* chosen_ids = reinterpret_cast<int32_t*>(chosen + K + 1);

  if (blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;  // of add_up_noisy_kernel
  Acc importance[kSlots], load[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) importance[i] = load[i] = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
       t < shape.num_tokens; t += stride) {
    NoisyLogits<Acc, kSlots> z;
    {
      Acc unused[kSlots];
      z.load(clean + t * E, spread + t * E, noise + t * E, E, static_cast<Acc>(shape.min_noise),
             unused);
    }
    if (bad_values != nullptr) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (lane + i * kWarpSize < E && !isfinite(z.noisy[i])) atomicAdd(bad_values, 1);
      }
    }
    LaneCandidates<Key, kSlots> candidates;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      candidates.keys[i] = lane + i * kWarpSize < E ? order_key(z.noisy[i]) : 0;
    }
    candidates.prepare();
    __syncwarp();  // the last token's choices were read
    const uint64_t taken = choose_best<true>(candidates, z.noisy, K, E, chosen, chosen_ids);
    if (ranks > K) choose_best<true>(candidates, z.noisy, 1, E, chosen + K, chosen_ids + K);
    __syncwarp();

    const Acc top = chosen[0], let_in = chosen[K - 1];
    const Acc left_out = ranks > K ? chosen[K] : Acc(0);
    Acc sum = 0;
    for (int k = lane; k < K; k += kWarpSize) sum += exp(chosen[k] - top);
    const Acc factor = Acc(1) / warp_sum(sum);
    for (int k = lane; k < K; k += kWarpSize) {
      topk_weights[t * K + k] = exp(chosen[k] - top) * factor;
      topk_ids[t * K + k] = chosen_ids[k];
    }
    if (lane == 0) runner_up[t] = ranks > K ? chosen_ids[K] : -1;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool in = taken >> i & 1;
      if (in) importance[i] += exp(z.noisy[i] - top) * factor;
      const Acc mark = in ? left_out : let_in;
      // Phi(x) is erfc(-x / sqrt(2)) / 2.
      const Acc stays =
          Acc(0.5) * erfc((mark - z.clean[i]) / z.sigma[i] * Acc(0.70710678118654752440));
      load[i] += ranks > K ? stays : Acc(in);
    }
  }
  __syncthreads();
  Acc* row = partial + static_cast<int64_t>(blockIdx.x) * 2 * E;
  add_up_warps(importance, E, tile, row);
  add_up_warps(load, E, tile, row + E);
}

// How much the squared coefficient of variation rises with a value: offset + slope * value.
struct Variation {
  double squared;  // var / (mean^2 + tiny)
  double offset, slope;
};
__device__ __forceinline__ Variation variation(double sum, double squares, int count) {
  constexpr double kTiny = 1e-30;
  const double mean = sum / count, divisor = mean * mean + kTiny;
  const double variance = squares / count - mean * mean;
  const double slope = 2 / (count * divisor);
  const double along = 2 * mean / count * variance / (divisor * divisor);
  return {(variance > 0 ? variance : variance * 0) / divisor, -slope * mean - along, slope};
}

// sums [2, E] = the sums over the rows of partial [B, 2, E], importance and load. A block owns 32
// of them, a lane one; its 32 warps share the rows. The block that ends last, of which `ticket`
// tells, computes the loss, the sum of both squared coefficients of variation; the ticket is 0
// before.
template <typename Acc>
__global__ void __launch_bounds__(1024)
    add_up_noisy_kernel(const Acc* __restrict__ partial, int num_rows, int num_experts,
                        int32_t* ticket, Acc* importance, Acc* load, Acc* __restrict__ loss) {
  __shared__ Acc tile[kWarpSize][kWarpSize + 1];
  __shared__ bool last;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int width = 2 * num_experts, i = blockIdx.x * kWarpSize + lane;
  Acc sum = 0;
  if (i < width) {
#pragma unroll 8
    for (int row = warp; row < num_rows; row += kWarpSize) {
      sum += partial[static_cast<int64_t>(row) * width + i];
    }
  }
  tile[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(tile[lane][warp]);
  const int owner = blockIdx.x * kWarpSize + warp;
  if (lane == 0 && owner < width) {
    *(owner < num_experts ? importance + owner : load + owner - num_experts) = sum;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last || warp != 0) return;
  double moments[4] = {0, 0, 0, 0};  // sum and sum of squares of importance, then of load
  for (int e = lane; e < num_experts; e += kWarpSize) {
    // Other blocks wrote them: not from this one's L1.
    const double first = __ldcg(importance + e), second = __ldcg(load + e);
    moments[0] += first;
    moments[1] += first * first;
    moments[2] += second;
    moments[3] += second * second;
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) moments[m] = warp_sum(moments[m]);
  if (lane == 0) {
    *loss = static_cast<Acc>(variation(moments[0], moments[1], num_experts).squared +
                             variation(moments[2], moments[3], num_experts).squared);
  }
}

// wanted[i] becomes the gradient of a sum over the tokens, that of the loss included.
template <typename Acc, int kSlots>
__device__ __forceinline__ void sum_gradient(const Acc* __restrict__ grad_sums,
                                             const Acc* __restrict__ grad_loss,
                                             const Acc* __restrict__ sums, int num_experts,
                                             Acc (&wanted)[kSlots]) {
  const int lane = threadIdx.x % kWarpSize;
  double sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    const Acc own = e < num_experts ? sums[e] : Acc(0);
    wanted[i] = own;
    sum += own;
    squares += static_cast<double>(own) * own;
  }
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  const Variation along = variation(sum, squares, num_experts);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int e = lane + i * kWarpSize;
    const double slope = along.offset + along.slope * wanted[i];
    wanted[i] = grad_loss != nullptr ? static_cast<Acc>(*grad_loss * slope) : Acc(0);
    if (grad_sums != nullptr && e < num_experts) wanted[i] += grad_sums[e];
  }
}

// The gradient of weights, importance, load and loss, each of which may be missing, with respect to
// clean logits and spread.
template <typename T, int kSlots>
__global__ void __launch_bounds__(256) noisy_topk_route_backward_kernel(
    const device_accumulate_t<T>* __restrict__ grad_topk_weights,
    const device_accumulate_t<T>* __restrict__ grad_importance,
    const device_accumulate_t<T>* __restrict__ grad_load,
    const device_accumulate_t<T>* __restrict__ grad_loss, const T* __restrict__ clean,
    const T* __restrict__ spread, const T* __restrict__ noise, const int64_t* __restrict__ topk_ids,
    const int64_t* __restrict__ runner_up, const device_accumulate_t<T>* __restrict__ importance,
    const device_accumulate_t<T>* __restrict__ load, NoisyShape shape, T* __restrict__ grad_clean,
    T* __restrict__ grad_spread) {
  using Acc = device_accumulate_t<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int K = shape.top_k, E = shape.num_experts;
  Acc wanted_importance[kSlots], wanted_load[kSlots];
  sum_gradient(grad_importance, grad_loss, importance, E, wanted_importance);
  sum_gradient(grad_load, grad_loss, load, E, wanted_load);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t t =
           static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       t < shape.num_tokens; t += stride) {
    NoisyLogits<Acc, kSlots> z;
    Acc spreads[kSlots];
    z.load(clean + t * E, spread + t * E, noise + t * E, E, static_cast<Acc>(shape.min_noise),
           spreads);
    const int64_t next = runner_up[t];
    const bool moves = next >= 0 && next < E;  // the load has a gradient

    // Gradient with respect to each weight, and which of the lane's experts were chosen.
    Acc grad[kSlots];
    uint64_t taken = 0;
    int last = -1;
    for (int k = 0; k < K; ++k) {
      const int64_t e = topk_ids[t * K + k];
      if (e < 0 || e >= E) continue;
      last = static_cast<int>(e);
      const Acc g = grad_topk_weights != nullptr ? grad_topk_weights[t * K + k] : Acc(0);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (e == lane + i * kWarpSize) {
          grad[i] = g + wanted_importance[i];
          taken |= uint64_t{1} << i;
        }
      }
    }
    const auto of_expert = [&](const Acc(&values)[kSlots], int expert) {
      Acc own = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) own = i == expert / kWarpSize ? values[i] : own;
      return __shfl_sync(kFullMask, own, expert % kWarpSize);
    };
    const Acc let_in = last >= 0 ? of_expert(z.noisy, last) : Acc(0);
    const Acc left_out = moves ? of_expert(z.noisy, static_cast<int>(next)) : Acc(0);

    Acc top = Acc(-INFINITY), sum = 0, dot = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if ((taken >> i & 1) && z.noisy[i] > top) top = z.noisy[i];
    }
    top = warp_max(top);
    Acc weight[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      weight[i] = taken >> i & 1 ? exp(z.noisy[i] - top) : Acc(0);
      sum += weight[i];
    }
    const Acc factor = Acc(1) / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      weight[i] *= factor;
      if (taken >> i & 1) dot += weight[i] * grad[i];
    }
    dot = warp_sum(dot);
    // grad becomes the gradient with respect to the noisy logits.
    Acc to_let_in = 0, to_left_out = 0;
    Acc over_clean[kSlots], over_sigma[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool in = taken >> i & 1;
      grad[i] = in ? weight[i] * (grad[i] - dot) : Acc(0);
      const Acc distance = (z.clean[i] - (in ? left_out : let_in)) / z.sigma[i];
      const Acc density = exp(Acc(-0.5) * distance * distance) * Acc(0.39894228040143267794);
      const Acc rise =
          moves && lane + i * kWarpSize < E ? wanted_load[i] * density / z.sigma[i] : Acc(0);
      over_clean[i] = rise;
      over_sigma[i] = -rise * distance;
      (in ? to_left_out : to_let_in) -= rise;
    }
    to_let_in = warp_sum(to_let_in);
    to_left_out = warp_sum(to_left_out);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int e = lane + i * kWarpSize;
      if (e >= E) continue;
      if (e == last) grad[i] += to_let_in;
      if (moves && e == next) grad[i] += to_left_out;
      const Acc logistic = Acc(1) / (Acc(1) + exp(-spreads[i]));
      grad_clean[t * E + e] = from_accumulate<T>(over_clean[i] + grad[i]);
      grad_spread[t * E + e] =
          from_accumulate<T>((over_sigma[i] + grad[i] * z.noise[i]) * logistic);
    }
  }
}

}  // namespace moeops
