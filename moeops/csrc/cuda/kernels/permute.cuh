// Rows into expert order and back. T tokens, K experts per token, R rows, D columns, all row-major.
// A pair whose row is not below the last offset is dead: it costs one look at pair_to_row. Where
// there are fewer rows than pairs (kSparse), most slots of a token may be dead, and a warp sorts
// them out 32 at a time.
#pragma once

#include "vector.cuh"

namespace moeops {

// Which of up to 32 slots hold a live row, as bits; all lanes of the warp ask together.
__device__ __forceinline__ unsigned live_slots(const int32_t* slot_rows, int count, int64_t live) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = lane < count ? slot_rows[lane] : -1;
  return __ballot_sync(kFullMask, row >= 0 && row < live);
}

// Copies token t to its live rows, and zeros to the rows behind them. A group of blockDim.x
// threads, whole warps, owns a token and reads it once; blockDim.y groups share a block. `Word`
// moves columns; D is counted in words.
template <typename Word, bool kSparse>
__global__ void __launch_bounds__(256)
    permute_kernel(const Word* __restrict__ x, const int32_t* __restrict__ pair_to_row,
                   const int32_t* __restrict__ offsets, int num_experts, int64_t num_tokens,
                   int top_k, int64_t num_rows, int64_t width, Word* __restrict__ rows) {
  const int64_t live = live_rows(offsets, num_experts, num_rows);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = first; t < num_tokens; t += stride) {
    const int32_t* targets = pair_to_row + t * top_k;
    if constexpr (kSparse) {
      for (int k = 0; k < top_k; k += kWarpSize) {
        const unsigned slots = live_slots(targets + k, min(top_k - k, kWarpSize), live);
        if (slots == 0) continue;
        for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
          const Word value = x[t * width + c];
          for (unsigned left = slots; left != 0; left &= left - 1) {
            rows[int64_t{targets[k + __ffs(left) - 1]} * width + c] = value;
          }
        }
      }
    } else {
      for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
        const Word value = x[t * width + c];
#pragma unroll 8
        for (int k = 0; k < top_k; ++k) {
          const int64_t row = targets[k];
          if (row >= 0 && row < live) rows[row * width + c] = value;
        }
      }
    }
  }
  for (int64_t row = live + first; row < num_rows; row += stride) {
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) rows[row * width + c] = Word{};
  }
}

// Vectors a thread has in flight together: more cost registers and with them resident blocks.
constexpr int kUnpermuteLoads = 4;

// sum += weight * rows[row] for kRows rows at a time (-1: none) and the columns c + v * step.
template <typename T, int kElements, int kRows, int kColumns>
__device__ __forceinline__ void add_rows(const T* __restrict__ rows, const int64_t (&row)[kRows],
                                         const device_accumulate_t<T> (&weight)[kRows], int64_t c,
                                         int64_t step, int64_t width,
                                         device_accumulate_t<T> (&sum)[kColumns][kElements]) {
  using Vec = Vector<T, kElements>;
  Vec value[kRows][kColumns];
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      const int64_t column = c + v * step;
      value[u][v] =
          row[u] >= 0 && column < width ? load_vector<Vec>(rows + row[u] * width + column) : Vec{};
    }
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        sum[v][i] += weight[u] * to_accumulate(value[u][v].value[i]);
      }
    }
  }
}

// y[t] = sum_k weight * rows[pair_to_row[t, k]]; same ownership as permute_kernel. Dead pairs are
// not read. A thread takes kRows rows at a time, and as many columns as fill its loads. Plain
// loads: evict-first ones (ld.cs) halve the bandwidth here.
template <typename T, int kElements, int kRows, bool kSparse>
__global__ void __launch_bounds__(256)
    unpermute_kernel(const T* __restrict__ rows,
                     const device_accumulate_t<T>* __restrict__ topk_weights,
                     const int32_t* __restrict__ pair_to_row, const int32_t* __restrict__ offsets,
                     int num_experts, int64_t num_tokens, int top_k, int64_t num_rows,
                     int64_t width, T* __restrict__ y) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  constexpr int kColumns = kUnpermuteLoads / kRows;
  const int64_t live = live_rows(offsets, num_experts, num_rows);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= num_tokens) return;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kElements;
  // Whole groups take every step over the columns, so that all lanes join in sorting out the slots.
  const int64_t own = static_cast<int64_t>(threadIdx.x) * kElements;
  for (int64_t c = own; c - (kSparse ? own : 0) < width; c += kColumns * step) {
    Acc sum[kColumns][kElements] = {};
    int64_t row[kRows];
    Acc weight[kRows];
    if constexpr (kSparse) {
      for (int first = 0; first < top_k; first += kWarpSize) {
        const int64_t first_pair = t * top_k + first;
        unsigned left = live_slots(pair_to_row + first_pair, min(top_k - first, kWarpSize), live);
        while (left != 0) {
#pragma unroll
          for (int u = 0; u < kRows; ++u) {
            const int64_t pair = first_pair + __ffs(left) - 1;
            row[u] = left != 0 ? pair_to_row[pair] : -1;
            weight[u] = left != 0 ? (topk_weights ? topk_weights[pair] : Acc(1)) : Acc(0);
            left &= left - 1;
          }
          add_rows<T, kElements, kRows, kColumns>(rows, row, weight, c, step, width, sum);
        }
      }
    } else {
      for (int first = 0; first < top_k; first += kRows) {
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          const int64_t pair = t * top_k + first + u;
          row[u] = first + u < top_k ? pair_to_row[pair] : -1;
          if (row[u] >= live) row[u] = -1;
          weight[u] = row[u] >= 0 ? (topk_weights ? topk_weights[pair] : Acc(1)) : Acc(0);
        }
        add_rows<T, kElements, kRows, kColumns>(rows, row, weight, c, step, width, sum);
      }
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      const int64_t column = c + v * step;
      if (column >= width) continue;
      Vec out;
#pragma unroll
      for (int i = 0; i < kElements; ++i) out.value[i] = from_accumulate<T>(sum[v][i]);
      store_vector(y + t * width + column, out);
    }
  }
}

// A warp owns one pair, or with kSparse `span` consecutive ones, at most 32, and works on the live
// ones: grad_rows[row] = weight * grad_y[t], grad_weight = <rows[row], grad_y[t]>. The gradients of
// the weights of dead pairs become zero, and so do the rows behind the live ones.
template <typename T, int kElements, bool kSparse>
__global__ void __launch_bounds__(256)
    unpermute_backward_kernel(const T* __restrict__ grad_y, const T* __restrict__ rows,
                              const device_accumulate_t<T>* __restrict__ topk_weights,
                              const int32_t* __restrict__ pair_to_row,
                              const int32_t* __restrict__ offsets, int num_experts,
                              int64_t num_pairs, int top_k, int span, int64_t num_rows,
                              int64_t width, T* __restrict__ grad_rows,
                              device_accumulate_t<T>* __restrict__ grad_topk_weights) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  const int64_t live = live_rows(offsets, num_experts, num_rows);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  const auto differentiate = [&](int64_t pair, int64_t row) {
    const Acc weight = topk_weights[pair];
    const T* grad = grad_y + pair / top_k * width;
    Acc dot = 0;
    for (int64_t c = lane * kElements; c < width; c += kWarpSize * kElements) {
      const Vec g = load_vector<Vec>(grad + c);
      const Vec r = load_vector<Vec>(rows + row * width + c);
      Vec out;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const Acc gi = to_accumulate(g.value[i]);
        dot += gi * to_accumulate(r.value[i]);
        out.value[i] = from_accumulate<T>(weight * gi);
      }
      store_vector(grad_rows + row * width + c, out);
    }
    dot = warp_sum(dot);
    if (lane == 0) grad_topk_weights[pair] = dot;
  };
  if constexpr (kSparse) {
    for (int64_t first = warp * span; first < num_pairs; first += num_warps * span) {
      const int count = static_cast<int>(min(static_cast<int64_t>(span), num_pairs - first));
      unsigned left = live_slots(pair_to_row + first, count, live);
      if (lane < count && (left >> lane & 1) == 0) grad_topk_weights[first + lane] = Acc(0);
      for (; left != 0; left &= left - 1) {
        const int64_t pair = first + __ffs(left) - 1;
        differentiate(pair, pair_to_row[pair]);
      }
    }
  } else {
    for (int64_t pair = warp; pair < num_pairs; pair += num_warps) {
      const int64_t row = pair_to_row[pair];
      if (row >= 0 && row < live) {
        differentiate(pair, row);
      } else if (lane == 0) {
        grad_topk_weights[pair] = Acc(0);
      }
    }
  }
  for (int64_t row = live + warp; row < num_rows; row += num_warps) {
    for (int64_t c = lane * kElements; c < width; c += kWarpSize * kElements) {
      store_vector(grad_rows + row * width + c, Vec{});
    }
  }
}

}  // namespace moeops
