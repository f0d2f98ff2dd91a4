// What a grouped product needs to know of the experts' rows, in one launch of one block.
#pragma once

#include "hopper/layouts.cuh"
#include "vector.cuh"

namespace moeops {

constexpr int kPlanThreads = 1024;
constexpr int kTileRows = 128;
// Row tiles that are visited together: few of them keep the rows of a wave of tiles close in
// memory, all of an expert read its weights once.
constexpr int kSmallGroup = 8, kLargeGroup = hopper::kMaxGroup;

// An inclusive scan over the block; `combine` is associative. Ends with a barrier.
template <typename Combine>
__device__ __forceinline__ int block_scan(int value, int* warp_totals, const Combine& combine) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int d = 1; d < kWarpSize; d *= 2) {
    const int below = __shfl_up_sync(kFullMask, value, d);
    if (lane >= d) value = combine(value, below);
  }
  if (lane == kWarpSize - 1) warp_totals[warp] = value;
  __syncthreads();
  if (warp == 0) {
    int total = warp_totals[lane];
#pragma unroll
    for (int d = 1; d < kWarpSize; d *= 2) {
      const int below = __shfl_up_sync(kFullMask, total, d);
      if (lane >= d) total = combine(total, below);
    }
    warp_totals[lane] = total;
  }
  __syncthreads();
  if (warp > 0) value = combine(value, warp_totals[warp - 1]);
  __syncthreads();
  return value;
}

// Groups of near-equal size, even ones but for an expert's last, so that pairs of CTAs fit in.
__device__ __forceinline__ int group_of_tile(int first, int count, int i, int limit) {
  const int groups = (count + limit - 1) / limit;
  const int size = ((count + groups - 1) / groups + 1) & ~1;
  const int start = i / size * size;
  return hopper::group_word(first + start, min(size, count - start));
}

// safe [E + 1]: the offsets, made to rise from 0 and to stay within the rows, whatever the caller
// passed. tiles (may be null): for every expert its blocks of at most kTileRows rows, as {expert |
// rows << 24, first row, group word for small groups, group word for large ones}.
__global__ void __launch_bounds__(kPlanThreads)
    plan_rows_kernel(const int32_t* __restrict__ offsets, int num_experts, int64_t num_rows,
                     int32_t* __restrict__ safe, int4* __restrict__ tiles,
                     int32_t* __restrict__ num_tiles) {
  __shared__ int warp_totals[kWarpSize], first_tile[kPlanThreads + 1], first_row[kPlanThreads + 1];
  const int limit = static_cast<int>(num_rows);
  int row_carry = 0, tile_carry = 0;
  if (threadIdx.x == 0) safe[0] = 0;
  for (int e0 = 0; e0 < num_experts; e0 += kPlanThreads) {
    const int e = e0 + threadIdx.x;
    int end = e < num_experts ? min(max(offsets[e + 1], 0), limit) : 0;
    end = max(block_scan(end, warp_totals, [](int a, int b) { return max(a, b); }), row_carry);
    if (e < num_experts) safe[e + 1] = end;
    first_row[threadIdx.x + 1] = end;
    if (threadIdx.x == 0) first_row[0] = row_carry;
    __syncthreads();
    row_carry = first_row[kPlanThreads];
    if (tiles == nullptr) {
      __syncthreads();
      continue;
    }
    const int count = (end - first_row[threadIdx.x] + kTileRows - 1) / kTileRows;
    const int until = block_scan(count, warp_totals, [](int a, int b) { return a + b; });
    first_tile[threadIdx.x + 1] = until;
    if (threadIdx.x == 0) first_tile[0] = 0;
    __syncthreads();
    // Tiles of these experts, one per thread: the expert is found by bisection.
    for (int i = threadIdx.x; i < first_tile[kPlanThreads]; i += kPlanThreads) {
      int low = 0, high = kPlanThreads;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (first_tile[middle] <= i ? low : high) = middle;
      }
      const int own = first_tile[low], own_count = first_tile[low + 1] - own;
      const int row = first_row[low] + (i - own) * kTileRows;
      const int rows = min(first_row[low + 1] - row, kTileRows);
      tiles[tile_carry + i] =
          make_int4((e0 + low) | rows << 24, row,
                    group_of_tile(tile_carry + own, own_count, i - own, kSmallGroup),
                    group_of_tile(tile_carry + own, own_count, i - own, kLargeGroup));
    }
    tile_carry += first_tile[kPlanThreads];
    __syncthreads();
  }
  if (threadIdx.x == 0 && num_tiles != nullptr) *num_tiles = tile_carry;
}

}  // namespace moeops
