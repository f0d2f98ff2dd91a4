// Rows into expert order and back. T tokens, K experts per token, N = T * K rows, D columns, all
// row-major.
#pragma once

#include "vector.cuh"

namespace moeops {

// Copies token t to its K rows, or zeros where the pair was dropped. A group of blockDim.x threads
// owns a token and reads it once; blockDim.y groups share a block. `Word` moves columns; D is
// counted in words.
template <typename Word>
__global__ void __launch_bounds__(256)
    permute_kernel(const Word* __restrict__ x, const int32_t* __restrict__ pair_to_row,
                   const int32_t* __restrict__ offsets, int num_experts, int64_t num_tokens,
                   int top_k, int64_t width, Word* __restrict__ rows) {
  const int64_t num_rows = num_tokens * top_k;
  const int64_t live = live_rows(offsets, num_experts, num_rows);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < num_tokens;
       t += stride) {
    const int32_t* targets = pair_to_row + t * top_k;
    for (int64_t c = threadIdx.x; c < width; c += blockDim.x) {
      const Word value = x[t * width + c];
#pragma unroll 8
      for (int k = 0; k < top_k; ++k) {
        const int64_t row = targets[k];
        if (row < 0 || row >= num_rows) continue;
        rows[row * width + c] = row < live ? value : Word{};
      }
    }
  }
}

// Vectors a thread has in flight together: more cost registers and with them resident blocks.
constexpr int kUnpermuteLoads = 4;

// y[t] = sum_k weight * rows[pair_to_row[t, k]]; same ownership as permute_kernel. Dropped pairs
// are not read. A thread takes kRows rows at a time, and as many columns as fill its loads. Plain
// loads: evict-first ones (ld.cs) halve the bandwidth here.
template <typename T, int kElements, int kRows>
__global__ void __launch_bounds__(256)
    unpermute_kernel(const T* __restrict__ rows,
                     const device_accumulate_t<T>* __restrict__ topk_weights,
                     const int32_t* __restrict__ pair_to_row, const int32_t* __restrict__ offsets,
                     int num_experts, int64_t num_tokens, int top_k, int64_t width,
                     T* __restrict__ y) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  constexpr int kColumns = kUnpermuteLoads / kRows;
  const int64_t live = live_rows(offsets, num_experts, num_tokens * top_k);
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= num_tokens) return;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kElements;
  for (int64_t c = static_cast<int64_t>(threadIdx.x) * kElements; c < width; c += kColumns * step) {
    Acc sum[kColumns][kElements] = {};
    for (int first = 0; first < top_k; first += kRows) {
      Vec value[kRows][kColumns];
      Acc weight[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t pair = t * top_k + first + u;
        const int64_t row = first + u < top_k ? pair_to_row[pair] : -1;
        const bool used = row >= 0 && row < live;
        weight[u] = used ? (topk_weights ? topk_weights[pair] : Acc(1)) : Acc(0);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          const int64_t column = c + v * step;
          value[u][v] =
              used && column < width ? load_vector<Vec>(rows + row * width + column) : Vec{};
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

// A warp owns pair (t, k): grad_rows[row] = weight * grad_y[t], grad_weight = <rows[row],
// grad_y[t]>. Rows of dropped pairs become zero, and so does their weight's gradient.
template <typename T, int kElements>
__global__ void __launch_bounds__(256)
    unpermute_backward_kernel(const T* __restrict__ grad_y, const T* __restrict__ rows,
                              const device_accumulate_t<T>* __restrict__ topk_weights,
                              const int32_t* __restrict__ pair_to_row,
                              const int32_t* __restrict__ offsets, int num_experts,
                              int64_t num_rows, int top_k, int64_t width, T* __restrict__ grad_rows,
                              device_accumulate_t<T>* __restrict__ grad_topk_weights) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  const int64_t live = live_rows(offsets, num_experts, num_rows);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (int64_t pair =
           static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       pair < num_rows; pair += stride) {
    const int64_t row = pair_to_row[pair];
    if (row < 0 || row >= num_rows) {
      if (lane == 0) grad_topk_weights[pair] = Acc(0);
      continue;
    }
    const bool used = row < live;
    const Acc weight = topk_weights[pair];
    const T* grad = grad_y + pair / top_k * width;
    Acc dot = 0;
    for (int64_t c = lane * kElements; c < width; c += kWarpSize * kElements) {
      Vec out{};
      if (used) {
        const Vec g = load_vector<Vec>(grad + c);
        const Vec r = load_vector<Vec>(rows + row * width + c);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const Acc gi = to_accumulate(g.value[i]);
          dot += gi * to_accumulate(r.value[i]);
          out.value[i] = from_accumulate<T>(weight * gi);
        }
      }
      store_vector(grad_rows + row * width + c, out);
    }
    dot = warp_sum(dot);
    if (lane == 0) grad_topk_weights[pair] = used ? dot : Acc(0);
  }
}

}  // namespace moeops
