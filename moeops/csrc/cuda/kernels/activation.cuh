// The pointwise middle of the expert block, forward and backward. R rows in expert order, H hidden
// columns. A group of blockDim.x threads owns one row and reads it in whole 16-byte vectors side by
// side, so that each of the streams touches memory in long runs; blockDim.y groups share a block.
// Rows past the last offset are skipped.
#pragma once

#include "activation_options.h"
#include "vector.cuh"

namespace moeops {

// Gated are: silu(gate) * up alone, in few instructions; units with options, whose rows of the
// pre-activation are all of the gate and then all of up, or both in turns.
enum class Activation { kSwiglu, kGlu, kGluInTurns, kGelu, kRelu, kSilu, kReluSquared };

__host__ __device__ constexpr bool is_gated(Activation activation) {
  return activation == Activation::kSwiglu || activation == Activation::kGlu ||
         activation == Activation::kGluInTurns;
}
__host__ __device__ constexpr bool has_options(Activation activation) {
  return activation == Activation::kGlu || activation == Activation::kGluInTurns;
}

constexpr int kActivationThreads = 256;

// 2^x and 1 / x by one instruction each, to a relative error of 2^-22 and 2^-23; denormal numbers
// are zero.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / (1 + exp(-z)); half types use the fast instructions, whose error is far below their rounding.
template <typename T>
__device__ __forceinline__ device_accumulate_t<T> sigmoid(device_accumulate_t<T> z) {
  if constexpr (sizeof(T) == 2) {
    constexpr float kLog2E = 1.4426950408889634f;
    return fast_reciprocal(1.0f + fast_exp2(-kLog2E * z));
  } else {
    return 1 / (1 + exp(-z));
  }
}

// GELU z * cdf(z) of the standard normal distribution, and its derivative cdf(z) + z * density(z).
template <typename Acc>
__device__ __forceinline__ void gelu(Acc z, Acc& value, Acc& slope) {
  const Acc cdf = Acc(0.5) * (Acc(1) + erf(z * Acc(0.70710678118654752440)));
  const Acc density = Acc(0.39894228040143267794) * exp(Acc(-0.5) * z * z);
  value = z * cdf;
  slope = cdf + z * density;
}

// The same for half types, in few instructions: erf would cost more than the memory traffic around
// it. cdf(-|z|), the tail, is 0.5 * erfcx(|z| / sqrt 2) * exp(-z^2 / 2), with erfcx as a polynomial
// in 1 / (1 + 0.53 |z| / sqrt 2), fitted here to a relative error of 4e-5 up to |z| = 14; the
// exponential is that of the density too.
__device__ __forceinline__ void fast_gelu(float z, float& value, float& slope) {
  constexpr float kHalfLog2E = 0.72134752044448170f, kInvSqrt2Pi = 0.39894228040143268f;
  constexpr float kFar = 64;  // where the tail is zero, and times infinity would not be
  const float distance = fminf(fabsf(z), kFar);
  const float decay = fast_exp2(z * z * -kHalfLog2E);
  const float t = fast_reciprocal(fmaf(0.37476659402887f, distance, 1.0f));
  float tail = fmaf(-0.09050307f, t, 0.200441985f);
  tail = fmaf(tail, t, 0.083449080f);
  tail = fmaf(tail, t, 0.157643745f);
  tail = fmaf(tail, t, 0.14896895f) * t * decay;
  value = fmaf(-distance, tail, fmaxf(z, 0.0f));  // NaN by the tail
  const float cdf = (z < 0 ? 0.0f : 1.0f) - copysignf(tail, z);
  slope = fmaf(z * kInvSqrt2Pi, decay, cdf);
}

// Value and derivative of an activation of one variable.
template <typename T, Activation kActivation, typename Acc = device_accumulate_t<T>>
__device__ __forceinline__ void activate(Acc z, Acc& value, Acc& slope) {
  if constexpr (kActivation == Activation::kGelu) {
    if constexpr (sizeof(T) == 2) {
      fast_gelu(z, value, slope);
    } else {
      gelu(z, value, slope);
    }
  } else if constexpr (kActivation == Activation::kRelu) {
    value = z < 0 ? Acc(0) : z;  // keeps NaN
    slope = z <= 0 ? Acc(0) : Acc(1);
  } else if constexpr (kActivation == Activation::kReluSquared) {
    const Acc kept = z < 0 ? Acc(0) : z;  // keeps NaN
    value = kept * kept;
    slope = 2 * kept;
  } else {
    const Acc gate = sigmoid<T>(z);
    value = z * gate;
    slope = gate * (Acc(1) + z * (Acc(1) - gate));
  }
}

// A hidden value and its slopes by the gate, or what stands alone, and by up.
template <typename Acc>
struct Hidden {
  Acc value, by_gate, by_up;
};

// Of a unit with options. Comparisons are written so that NaN stays NaN; what is clamped has no
// slope, its limits themselves have.
template <typename T, typename Acc = device_accumulate_t<T>>
__device__ __forceinline__ Hidden<Acc> glu(const GluConstants<Acc>& unit, Acc gate, Acc up) {
  constexpr Acc kLargest = 1e30f;  // times a cubic of zero an infinity would be NaN
  const Acc g = gate > unit.limit ? unit.limit : gate;
  const Acc square = g * g;
  const Acc cubic = unit.cubic * (square > kLargest ? kLargest : square);
  const Acc s = sigmoid<T>(g * (unit.alpha + cubic));
  const Acc value = g * s, slope = s * (1 + g * (1 - s) * (unit.alpha + 3 * cubic));
  Acc u = up > unit.limit ? unit.limit : up;
  u = (u < -unit.limit ? -unit.limit : u) + unit.offset;
  return {value * u, gate > unit.limit ? Acc(0) : slope * u,
          up > unit.limit || up < -unit.limit ? Acc(0) : value};
}

template <typename T, Activation kActivation, typename Acc = device_accumulate_t<T>>
__device__ __forceinline__ Hidden<Acc> activate(const GluConstants<Acc>& unit, Acc gate, Acc up) {
  if constexpr (has_options(kActivation)) {
    return glu<T>(unit, gate, up);
  } else {
    Acc value, slope;
    activate<T, kActivation>(gate, value, slope);
    if constexpr (is_gated(kActivation)) {
      return {value * up, slope * up, value};
    } else {
      return {value, slope, Acc(0)};
    }
  }
}

// Two vectors of a row of the pre-activation that hold gate and up of kElements hidden values from
// column c on: side by side where both are in turns, else H apart.
template <Activation kActivation, int kElements>
struct PreColumns {
  int64_t first, second;

  __device__ __forceinline__ PreColumns(int64_t c, int64_t hidden_width)
      : first(kActivation == Activation::kGluInTurns ? 2 * c : c),
        second(kActivation == Activation::kGluInTurns ? 2 * c + kElements : hidden_width + c) {}
};

// From two vectors as they lie in memory to gate and up, and back.
template <Activation kActivation, typename T, int kElements>
__device__ __forceinline__ void to_gate_and_up(Vector<T, kElements>& a, Vector<T, kElements>& b) {
  if constexpr (kActivation == Activation::kGluInTurns && kElements > 1) {
    const Vector<T, kElements> lying[2] = {a, b};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      a.value[i] = lying[2 * i / kElements].value[2 * i % kElements];
      b.value[i] = lying[2 * i / kElements].value[2 * i % kElements + 1];
    }
  }
}
template <Activation kActivation, typename T, int kElements>
__device__ __forceinline__ void from_gate_and_up(Vector<T, kElements>& a, Vector<T, kElements>& b) {
  if constexpr (kActivation == Activation::kGluInTurns && kElements > 1) {
    const Vector<T, kElements> halves[2] = {a, b};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      a.value[i] = halves[i % 2].value[i / 2];
      b.value[i] = halves[i % 2].value[(kElements + i) / 2];
    }
  }
}

template <typename T, int kElements>
__device__ __forceinline__ void add_vector(Vector<T, kElements>& v, const T* other) {
  const auto o = load_vector<Vector<T, kElements>>(other);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    v.value[i] = from_accumulate<T>(to_accumulate(v.value[i]) + to_accumulate(o.value[i]));
  }
}

// hidden = act(pre). With a bias, pre += bias[expert] first, in place.
template <typename T, Activation kActivation, int kElements>
__global__ void __launch_bounds__(256)
    activation_kernel(T* __restrict__ pre, const T* __restrict__ bias,
                      const int32_t* __restrict__ offsets, int num_experts, int64_t num_rows,
                      int64_t hidden_width, GluConstants<device_accumulate_t<T>> unit,
                      T* __restrict__ hidden) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  constexpr bool kGated = is_gated(kActivation);
  const int64_t pre_width = kGated ? 2 * hidden_width : hidden_width;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= live_rows(offsets, num_experts, num_rows)) return;
  T* own = pre + row * pre_width;
  const T* own_bias = bias ? bias + expert_of_row(offsets, num_experts, row) * pre_width : nullptr;
#pragma unroll 2
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kElements; c < hidden_width;
       c += static_cast<int64_t>(blockDim.x) * kElements) {
    const PreColumns<kActivation, kElements> at(c, hidden_width);
    Vec gate = load_vector<Vec>(own + at.first), up{};
    if constexpr (kGated) up = load_vector<Vec>(own + at.second);
    if (own_bias != nullptr) {
      add_vector<T, kElements>(gate, own_bias + at.first);
      store_vector(own + at.first, gate);
      if constexpr (kGated) {
        add_vector<T, kElements>(up, own_bias + at.second);
        store_vector(own + at.second, up);
      }
    }
    to_gate_and_up<kActivation>(gate, up);
    Vec out;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Hidden<Acc> h =
          activate<T, kActivation>(unit, to_accumulate(gate.value[i]), to_accumulate(up.value[i]));
      out.value[i] = from_accumulate<T>(h.value);
    }
    store_vector(hidden + row * hidden_width + c, out);
  }
}

template <typename T>
struct ActivationBackwardArgs {
  using Acc = device_accumulate_t<T>;
  const T* pre;             // [R, 2H or H]
  const T* grad_hidden;     // [R, H], of the unweighted hidden rows
  const Acc* topk_weights;  // [T, K]
  const T* grad_y;          // [T, D_out], read only with b_down
  const T* b_down;          // [E, D_out] or null
  bool wide_out;            // rows of grad_y and b_down are whole 16-byte vectors
  const int32_t* row_to_pair;
  const int32_t* offsets;
  int num_experts;
  int top_k;
  int64_t num_rows, num_pairs, hidden_width, out_width;
  GluConstants<Acc> unit;
  T* grad_pre;             // [R, 2H or H] or null
  T* weighted_hidden;      // [R, H] or null
  Acc* grad_topk_weights;  // [T, K] or null
};

// grad_pre = weight * act'(pre) * grad_hidden, weighted_hidden = weight * act(pre), and the routing
// weight's gradient <grad_hidden, act(pre)> (+ <grad_y, b_down>), all from one read of pre and
// grad_hidden. With as many rows as pairs, rows behind the live ones belong to dropped pairs, whose
// weights get a zero gradient; else the caller has filled in the zeros.
template <typename T, Activation kActivation, int kElements>
__global__ void __launch_bounds__(256)
    activation_backward_kernel(const ActivationBackwardArgs<T> args) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  constexpr bool kGated = is_gated(kActivation);
  const int64_t H = args.hidden_width;
  const int64_t pre_width = kGated ? 2 * H : H;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < live_rows(args.offsets, args.num_experts, args.num_rows);
  int64_t pair = row < args.num_rows ? args.row_to_pair[row] : -1;
  if (pair >= args.num_pairs || (!live && args.num_rows != args.num_pairs)) pair = -1;
  const bool active = live && pair >= 0;
  const Acc weight = active ? args.topk_weights[pair] : Acc(0);
  Acc dot = 0;
  if (active) {
    const T* pre = args.pre + row * pre_width;
    const T* grad_hidden = args.grad_hidden + row * H;
#pragma unroll 2
    for (int64_t c = static_cast<int64_t>(threadIdx.x) * kElements; c < H;
         c += static_cast<int64_t>(blockDim.x) * kElements) {
      const PreColumns<kActivation, kElements> at(c, H);
      Vec gate = load_vector<Vec>(pre + at.first), up{};
      if constexpr (kGated) up = load_vector<Vec>(pre + at.second);
      to_gate_and_up<kActivation>(gate, up);
      const Vec grad = load_vector<Vec>(grad_hidden + c);
      Vec grad_gate, grad_up, weighted;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const Hidden<Acc> h = activate<T, kActivation>(args.unit, to_accumulate(gate.value[i]),
                                                       to_accumulate(up.value[i]));
        const Acc g = to_accumulate(grad.value[i]);
        if constexpr (kGated) grad_up.value[i] = from_accumulate<T>(weight * g * h.by_up);
        grad_gate.value[i] = from_accumulate<T>(weight * g * h.by_gate);
        weighted.value[i] = from_accumulate<T>(weight * h.value);
        dot += g * h.value;
      }
      if (args.grad_pre) {
        if constexpr (kGated) from_gate_and_up<kActivation>(grad_gate, grad_up);
        store_vector(args.grad_pre + row * pre_width + at.first, grad_gate);
        if constexpr (kGated) store_vector(args.grad_pre + row * pre_width + at.second, grad_up);
      }
      if (args.weighted_hidden) store_vector(args.weighted_hidden + row * H + c, weighted);
    }
    if (args.b_down != nullptr && args.grad_topk_weights != nullptr) {
      const T* bias =
          args.b_down + expert_of_row(args.offsets, args.num_experts, row) * args.out_width;
      const T* grad = args.grad_y + pair / args.top_k * args.out_width;
      if (args.wide_out) {
        constexpr int kWide = 16 / sizeof(T);
        for (int64_t c = static_cast<int64_t>(threadIdx.x) * kWide; c < args.out_width;
             c += static_cast<int64_t>(blockDim.x) * kWide) {
          const auto g = load_vector<Vector<T, kWide>>(grad + c);
          const auto b = load_vector<Vector<T, kWide>>(bias + c);
#pragma unroll
          for (int i = 0; i < kWide; ++i) {
            dot += to_accumulate(g.value[i]) * to_accumulate(b.value[i]);
          }
        }
      } else {
        for (int64_t c = threadIdx.x; c < args.out_width; c += blockDim.x) {
          dot += to_accumulate(grad[c]) * to_accumulate(bias[c]);
        }
      }
    }
  }
  if (args.grad_topk_weights == nullptr) return;

  // The row's sum: within warps, then over the group's warps in order.
  __shared__ Acc partial[kActivationThreads / kWarpSize];
  const int warps = blockDim.x / kWarpSize;
  dot = warp_sum(dot);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.y * warps + threadIdx.x / kWarpSize] = dot;
  __syncthreads();
  if (threadIdx.x == 0 && pair >= 0) {
    Acc sum = 0;
    for (int w = 0; w < warps; ++w) sum += partial[threadIdx.y * warps + w];
    args.grad_topk_weights[pair] = sum;
  }
}

// y[t] += sum_k topk_weights[t, k] * bias[expert of (t, k)]; one warp owns a token, lane k looks up
// the expert of its choice k. Choices past the 32nd take further passes over y.
template <typename T, int kElements>
__global__ void __launch_bounds__(256)
    add_weighted_bias_kernel(const T* __restrict__ bias,
                             const device_accumulate_t<T>* __restrict__ topk_weights,
                             const int32_t* __restrict__ pair_to_row,
                             const int32_t* __restrict__ offsets, int num_experts,
                             int64_t num_tokens, int top_k, int64_t num_rows, int64_t width,
                             T* __restrict__ y) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  const int64_t live = live_rows(offsets, num_experts, num_rows);
  const int warps = blockDim.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarpSize;
  if (t >= num_tokens) return;
  for (int first = 0; first < top_k; first += kWarpSize) {
    const int count = min(top_k - first, kWarpSize);
    int expert = 0;
    Acc weight = 0;
    if (lane < count) {
      const int64_t pair = t * top_k + first + lane;
      const int64_t row = pair_to_row[pair];
      if (row >= 0 && row < live) {
        expert = expert_of_row(offsets, num_experts, row);
        weight = topk_weights[pair];
      }
    }
    const unsigned slots = __ballot_sync(kFullMask, weight != 0);  // NaN counts
    if (slots == 0) continue;
    // Whole warps take every step, so that all lanes join the shuffles.
    for (int64_t begin = 0; begin < width; begin += kWarpSize * kElements) {
      const int64_t c = begin + lane * kElements;
      const bool inside = c < width;
      Acc sum[kElements] = {};
      for (unsigned left = slots; left != 0; left &= left - 1) {
        const int k = __ffs(left) - 1;
        const int64_t e = __shfl_sync(kFullMask, expert, k);
        const Acc w = __shfl_sync(kFullMask, weight, k);
        if (!inside) continue;
        const Vec value = load_vector<Vec>(bias + e * width + c);
#pragma unroll
        for (int i = 0; i < kElements; ++i) sum[i] += w * to_accumulate(value.value[i]);
      }
      if (!inside) continue;
      Vec out = load_vector<Vec>(y + t * width + c);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        out.value[i] = from_accumulate<T>(to_accumulate(out.value[i]) + sum[i]);
      }
      store_vector(y + t * width + c, out);
    }
  }
}

}  // namespace moeops
