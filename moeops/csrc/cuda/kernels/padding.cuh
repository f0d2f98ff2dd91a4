// Rows to capacity buffers [E, C, D] and back, in words of any size. One warp owns one output row.
#pragma once

#include "vector.cuh"

namespace moeops {

template <typename Word>
__device__ __forceinline__ void copy_row(const Word* source, Word* target, int64_t width) {
  for (int64_t c = threadIdx.x % kWarpSize; c < width; c += kWarpSize) {
    target[c] = source != nullptr ? source[c] : Word{};
  }
}

template <typename Word>
__global__ void __launch_bounds__(256)
    pad_rows_kernel(const Word* __restrict__ rows, const int32_t* __restrict__ offsets,
                    int64_t num_rows, int64_t num_experts, int64_t capacity, int64_t width,
                    Word* __restrict__ padded) {
  const int warps = blockDim.x / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t slot = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarpSize;
       slot < num_experts * capacity; slot += stride) {
    const int64_t e = slot / capacity;
    const int64_t row = offsets[e] + slot % capacity;
    const bool used = row >= 0 && row < offsets[e + 1] && row < num_rows;
    copy_row(used ? rows + row * width : nullptr, padded + slot * width, width);
  }
}

template <typename Word>
__global__ void __launch_bounds__(256)
    unpad_rows_kernel(const Word* __restrict__ padded, const int32_t* __restrict__ offsets,
                      int64_t num_rows, int num_experts, int64_t capacity, int64_t width,
                      Word* __restrict__ rows) {
  const int warps = blockDim.x / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarpSize;
       row < num_rows; row += stride) {
    const int e = expert_of_row(offsets, num_experts, row);
    const int64_t slot = row - offsets[e];
    const bool used = slot >= 0 && slot < capacity && row < offsets[e + 1];
    copy_row(used ? padded + (e * capacity + slot) * width : nullptr, rows + row * width, width);
  }
}

}  // namespace moeops
