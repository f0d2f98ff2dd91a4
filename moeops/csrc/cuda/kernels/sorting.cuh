// Stable counting sort of token-expert pairs by expert. N pairs, R rows, E experts; bucket E holds
// the dropped pairs. Every block owns one chunk of consecutive pairs, every warp one segment of the
// chunk, so ranks follow pair order.
#pragma once

#include "vector.cuh"

namespace moeops {

struct SortShape {
  int64_t num_pairs;
  int64_t chunk;  // pairs per block, a multiple of warps * 32
  int64_t num_rows;
  int num_experts;
  bool drop_out_of_range;
};

// Who comes first: entry i of the queue is pair order[i], or with num_tokens > 0 choice
// i / num_tokens of token i % num_tokens, or pair i.
struct Queue {
  const int64_t* order;
  uint32_t num_tokens;
  uint32_t top_k;
};

__device__ __forceinline__ int64_t pair_at(const Queue& queue, int64_t i) {
  if (queue.order != nullptr) return queue.order[i];
  if (queue.num_tokens == 0) return i;
  const auto entry = static_cast<uint32_t>(i);  // as row numbers, pairs fit 31 bits
  const uint32_t choice = entry / queue.num_tokens;
  return static_cast<int64_t>(entry - choice * queue.num_tokens) * queue.top_k + choice;
}

// The bucket of an id: its expert, or E for a dropped or invalid pair; counts the invalid ones.
template <typename Id>
__device__ __forceinline__ int bucket_of(Id id, const SortShape& shape, int32_t* bad_values) {
  if (id >= 0 && id < shape.num_experts) return static_cast<int>(id);
  const bool legal = id == -1 || (id >= shape.num_experts && shape.drop_out_of_range);
  if (bad_values != nullptr && !legal) atomicAdd(bad_values, 1);
  return shape.num_experts;
}

// Buckets of the warp's entries first + 32 * u + lane, -1 past `end`; all loads are in flight
// together.
constexpr int kSortUnroll = 4;
template <typename Id>
__device__ __forceinline__ void load_buckets(const Id* __restrict__ ids, const SortShape& shape,
                                             const Queue& queue, int64_t first, int64_t end,
                                             int (&bucket)[kSortUnroll]) {
  Id id[kSortUnroll];
#pragma unroll
  for (int u = 0; u < kSortUnroll; ++u) {
    const int64_t p = first + u * kWarpSize + threadIdx.x % kWarpSize;
    id[u] = p < end ? ids[pair_at(queue, p)] : Id(0);
  }
#pragma unroll
  for (int u = 0; u < kSortUnroll; ++u) {
    const int64_t p = first + u * kWarpSize + threadIdx.x % kWarpSize;
    bucket[u] = p < end ? bucket_of(id[u], shape, nullptr) : -1;
  }
}

// counts[block][bucket] of the block's chunk. Shared memory: E + 1 integers.
template <typename Id>
__global__ void sort_count_kernel(const Id* __restrict__ ids, SortShape shape, Queue queue,
                                  int32_t* __restrict__ counts, int32_t* bad_values) {
  extern __shared__ int32_t histogram[];
  const int buckets = shape.num_experts + 1;
  for (int b = threadIdx.x; b < buckets; b += blockDim.x) histogram[b] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * shape.chunk;
  const int64_t end = min(begin + shape.chunk, shape.num_pairs);
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t p = first + threadIdx.x;
    const bool inside = p < end;
    const unsigned active = __ballot_sync(kFullMask, inside);
    if (!inside) continue;
    const int bucket = bucket_of(ids[pair_at(queue, p)], shape, bad_values);
    // One atomic per bucket and warp: all tokens on one expert would otherwise queue up.
    const unsigned peers = __match_any_sync(active, bucket);
    if (threadIdx.x % kWarpSize == __ffs(peers) - 1) atomicAdd(&histogram[bucket], __popc(peers));
  }
  __syncthreads();
  for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
    counts[static_cast<int64_t>(blockIdx.x) * buckets + b] = histogram[b];
  }
}

// Exclusive prefix sum over `values` in place by one warp; returns nothing, the last entry's sum is
// dropped.
__device__ __forceinline__ void warp_exclusive_scan(int32_t* values, int size) {
  const int lane = threadIdx.x % kWarpSize;
  int32_t carry = 0;
  for (int first = 0; first < size; first += kWarpSize) {
    const int i = first + lane;
    const int32_t own = i < size ? values[i] : 0;
    int32_t sum = own;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int32_t below = __shfl_up_sync(kFullMask, sum, offset);
      if (lane >= offset) sum += below;
    }
    if (i < size) values[i] = carry + sum - own;
    carry += __shfl_sync(kFullMask, sum, kWarpSize - 1);
  }
}

// Adds to mine[bucket] the warp's pairs of each bucket, -1 for none, of which `live` may be others.
__device__ __forceinline__ void count_in_warp(const int (&bucket)[kSortUnroll], int64_t live,
                                              int32_t* mine) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int u = 0; u < kSortUnroll; ++u) {
    if (u * kWarpSize >= live) break;
    const unsigned peers = __match_any_sync(kFullMask, bucket[u]);
    if (bucket[u] >= 0 && lane == __ffs(peers) - 1) mine[bucket[u]] += __popc(peers);
    __syncwarp();
  }
}

// The place of a pair among those of its bucket, of which next[bucket] came before the warp's 32;
// counts next up.
__device__ __forceinline__ int32_t place_in_warp(int bucket, int32_t* next) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned peers = __match_any_sync(kFullMask, bucket);
  const int leader = __ffs(peers) - 1;
  const bool leads = bucket >= 0 && lane == leader;
  int32_t place = leads ? next[bucket] : 0;
  place = __shfl_sync(kFullMask, place, leader) + __popc(peers & ((1u << lane) - 1));
  if (leads) next[bucket] = place + __popc(peers);
  return place;
}

// Writes both maps and, from block 0, the offsets. With fewer rows than pairs the dropped pairs,
// and those for which there is no row left, get the row R that does not exist; rows without a pair
// name pair 0. `surplus` counts the pairs that found no row.
// Shared memory: (2 + warps) * (E + 1) integers.
template <typename Id>
__global__ void sort_scatter_kernel(const Id* __restrict__ ids, SortShape shape,
                                    const int32_t* __restrict__ counts, int num_blocks,
                                    int32_t* __restrict__ row_to_pair,
                                    int32_t* __restrict__ pair_to_row,
                                    int32_t* __restrict__ offsets, int32_t* surplus) {
  const Queue queue{};
  extern __shared__ int32_t shared[];
  const int buckets = shape.num_experts + 1;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  int32_t* total = shared;               // first row of each bucket, after the scan
  int32_t* before = shared + buckets;    // pairs of the bucket in earlier blocks
  int32_t* position = before + buckets;  // [warps][buckets]: next row of the warp's next pair
  for (int b = threadIdx.x; b < (2 + warps) * buckets; b += blockDim.x) shared[b] = 0;
  __syncthreads();

  // Column sums of `counts`; groups of threads share the rows.
  const int columns = min(buckets, static_cast<int>(blockDim.x));
  const int groups = blockDim.x / columns;
  const int group = threadIdx.x / columns;
  if (group < groups) {
    for (int b = threadIdx.x % columns; b < buckets; b += columns) {
      int32_t all = 0, earlier = 0;
#pragma unroll 8
      for (int block = group; block < num_blocks; block += groups) {
        const int32_t count = counts[static_cast<int64_t>(block) * buckets + b];
        all += count;
        earlier += block < static_cast<int>(blockIdx.x) ? count : 0;
      }
      atomicAdd(&total[b], all);
      atomicAdd(&before[b], earlier);
    }
  }

  // Counts of the warp's own segment.
  const int64_t segment = shape.chunk / warps;
  const int64_t begin = min(blockIdx.x * shape.chunk + warp * segment, shape.num_pairs);
  const int64_t end = min(begin + segment, shape.num_pairs);
  int32_t* mine = position + warp * buckets;
  int bucket[kSortUnroll];
  for (int64_t first = begin; first < end; first += kSortUnroll * kWarpSize) {
    load_buckets(ids, shape, queue, first, end, bucket);
    count_in_warp(bucket, end - first, mine);
  }
  __syncthreads();
  if (warp == 0) warp_exclusive_scan(total, buckets);
  __syncthreads();
  for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
    int32_t next = total[b] + before[b];
    for (int w = 0; w < warps; ++w) {
      const int32_t count = position[w * buckets + b];
      position[w * buckets + b] = next;
      next += count;
    }
    if (blockIdx.x == 0) {
      offsets[b] = static_cast<int32_t>(min(int64_t{total[b]}, shape.num_rows));
    }
  }
  __syncthreads();

  const bool few_rows = shape.num_rows < shape.num_pairs;
  const int64_t live = total[shape.num_experts];
  if (surplus != nullptr && blockIdx.x == 0 && threadIdx.x == 0 && live > shape.num_rows) {
    *surplus = static_cast<int32_t>(live - shape.num_rows);
  }
  for (int64_t row = (few_rows ? live : shape.num_pairs) +
                     static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       row < shape.num_rows; row += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    row_to_pair[row] = 0;
  }
  const int rowless = few_rows ? shape.num_experts : buckets;  // the bucket that gets no rows
  const auto num_rows = static_cast<int32_t>(shape.num_rows);

  for (int64_t first = begin; first < end; first += kSortUnroll * kWarpSize) {
    load_buckets(ids, shape, queue, first, end, bucket);
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      const int32_t row = place_in_warp(bucket[u], mine);
      if (bucket[u] >= 0) {
        const int64_t p = first + u * kWarpSize + lane;
        const bool placed = bucket[u] != rowless && row < num_rows;
        if (placed) row_to_pair[row] = static_cast<int32_t>(p);
        pair_to_row[p] = placed ? row : num_rows;
      }
      __syncwarp();
    }
  }
}

// kept = the id of each pair that is among the first `capacity` of its expert's queue, -1 of the
// others. Shared memory: (1 + warps) * (E + 1) integers.
template <typename Id>
__global__ void limit_kernel(const Id* __restrict__ ids, SortShape shape, Queue queue,
                             const int32_t* __restrict__ counts, int64_t capacity,
                             Id* __restrict__ kept) {
  extern __shared__ int32_t shared[];
  const int buckets = shape.num_experts + 1;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  int32_t* before = shared;              // pairs of the bucket in earlier blocks
  int32_t* position = before + buckets;  // [warps][buckets]: place of the warp's next pair
  const int64_t segment = shape.chunk / warps;
  const int64_t begin = min(blockIdx.x * shape.chunk + warp * segment, shape.num_pairs);
  const int64_t end = min(begin + segment, shape.num_pairs);
  const bool held = segment <= kSortUnroll * kWarpSize;  // all of them in registers
  int bucket[kSortUnroll];
  load_buckets(ids, shape, queue, begin, end, bucket);
  for (int b = threadIdx.x; b < (1 + warps) * buckets; b += blockDim.x) shared[b] = 0;
  __syncthreads();

  // Column sums of the earlier blocks' counts; groups of threads share the rows.
  const int columns = min(buckets, static_cast<int>(blockDim.x));
  const int groups = blockDim.x / columns;
  const int group = threadIdx.x / columns;
  const int earlier_blocks = static_cast<int>(blockIdx.x);
  if (group < groups) {
    for (int b = threadIdx.x % columns; b < buckets; b += columns) {
      int32_t earlier = 0;
#pragma unroll 16
      for (int block = group; block < earlier_blocks; block += groups) {
        earlier += counts[static_cast<int64_t>(block) * buckets + b];
      }
      if (earlier != 0) atomicAdd(&before[b], earlier);
    }
  }
  int32_t* mine = position + warp * buckets;
  for (int64_t first = begin; first < end; first += kSortUnroll * kWarpSize) {
    if (!held) load_buckets(ids, shape, queue, first, end, bucket);
    count_in_warp(bucket, end - first, mine);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
    int32_t next = before[b];
#pragma unroll 8
    for (int w = 0; w < warps; ++w) {
      const int32_t count = position[w * buckets + b];
      position[w * buckets + b] = next;
      next += count;
    }
  }
  __syncthreads();
  for (int64_t first = begin; first < end; first += kSortUnroll * kWarpSize) {
    if (!held) load_buckets(ids, shape, queue, first, end, bucket);
#pragma unroll
    for (int u = 0; u < kSortUnroll; ++u) {
      if (first + u * kWarpSize >= end) break;
      const int32_t place = place_in_warp(bucket[u], mine);
      if (bucket[u] >= 0) {
        const bool fits = bucket[u] < shape.num_experts && place < capacity;
        kept[pair_at(queue, first + u * kWarpSize + lane)] = fits ? Id(bucket[u]) : Id(-1);
      }
      __syncwarp();
    }
  }
}

// counts[e] += the ids that are e. Every block owns a chunk, a multiple of blockDim.x * kCountIds;
// a thread has kCountIds ids in flight, kVector to a load if they are dense. Shared memory: E
// integers, or none with kShared false, where every expert of a warp costs an atomic on global
// memory.
constexpr int kCountIds = 8;
template <typename Id, int kVector, bool kShared>
__global__ void __launch_bounds__(256)
    count_tokens_kernel(const Id* __restrict__ ids, int64_t stride, SortShape shape,
                        int32_t* __restrict__ counts, int32_t* bad_values) {
  extern __shared__ int32_t histogram[];
  if constexpr (kShared) {
    for (int e = threadIdx.x; e < shape.num_experts; e += blockDim.x) histogram[e] = 0;
    __syncthreads();
  }
  int32_t* bins = kShared ? histogram : counts;
  const auto add = [&](int bucket) {
    // One atomic per expert and warp: all tokens on one expert would otherwise queue up.
    const unsigned peers = __match_any_sync(kFullMask, bucket);
    const bool leader = static_cast<int>(threadIdx.x % kWarpSize) == __ffs(peers) - 1;
    if (leader && bucket < shape.num_experts) atomicAdd(&bins[bucket], __popc(peers));
  };
  using Vec = Vector<Id, kVector>;
  const int64_t begin = blockIdx.x * shape.chunk;
  const int64_t end = min(begin + shape.chunk, shape.num_pairs);
  constexpr int kLoads = kCountIds / kVector;
  // Whole blocks take every step, so that all lanes join the matching.
  for (int64_t first = begin; first < end; first += static_cast<int64_t>(blockDim.x) * kCountIds) {
    Vec own[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t p = first + (static_cast<int64_t>(u) * blockDim.x + threadIdx.x) * kVector;
      if (kVector > 1 && p + kVector <= end) {
        own[u] = load_vector<Vec>(ids + p);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          own[u].value[i] = p + i < end ? ids[(p + i) * stride] : Id(-1);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) add(bucket_of(own[u].value[i], shape, bad_values));
    }
  }
  if constexpr (kShared) {
    __syncthreads();
    for (int e = threadIdx.x; e < shape.num_experts; e += blockDim.x) {
      if (histogram[e] != 0) atomicAdd(&counts[e], histogram[e]);
    }
  }
}

}  // namespace moeops
