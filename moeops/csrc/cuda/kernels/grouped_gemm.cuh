// Grouped matrix products for every dtype, stride and alignment; group sizes stay on the device.
//
// Problem of expert e: C[m, n] = sum_k A[m, k] * B[n, k]. Either the rows of C are ragged (a
// grouped linear) or k is ragged (its weight gradient). A block of 256 threads owns one kTile x
// kTile tile of one expert's C.
#pragma once

#include <mma.h>

#include "vector.cuh"

namespace moeops {

// Strides in elements. Exactly one of the two strides of a matrix is read as contiguous, see
// kRowsContiguous below.
struct GroupedGemmShape {
  const int32_t* offsets;  // [E + 1], rising from 0
  int num_experts;
  bool ragged_k;    // k runs over the expert's rows; otherwise m does
  int64_t m, n, k;  // of the dimensions that are not ragged
  int64_t a_expert, a_m, a_k;
  int64_t b_expert, b_n, b_k;
  int64_t c_expert, c_m;
};

// What one block computes: pointers at the expert's first element and the tile's origin.
template <typename T>
struct GemmTile {
  const T* a;
  const T* b;
  T* c;
  int64_t m_begin, n_begin, m_end, n_end, k_end;
  bool valid;
};

// Expert and row tile number `tile` of all row tiles, by one warp; expert = num_experts when there
// is no such tile.
__device__ __forceinline__ void find_row_tile(const int32_t* offsets, int num_experts, int64_t tile,
                                              int tile_rows, int& expert, int64_t& tile_in_expert) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t before = 0;
  for (int first = 0; first < num_experts; first += kWarpSize) {
    const int e = first + lane;
    const int rows = e < num_experts ? offsets[e + 1] - offsets[e] : 0;
    int64_t sum = (rows + tile_rows - 1) / tile_rows;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int64_t below = __shfl_up_sync(kFullMask, sum, offset);
      if (lane >= offset) sum += below;
    }
    const unsigned reached = __ballot_sync(kFullMask, before + sum > tile);
    if (reached != 0) {
      const int owner = __ffs(reached) - 1;
      const int64_t until = before + sum;
      const int64_t own = (rows + tile_rows - 1) / tile_rows;
      expert = first + owner;
      tile_in_expert = tile - __shfl_sync(kFullMask, until - own, owner);
      return;
    }
    before += __shfl_sync(kFullMask, sum, kWarpSize - 1);
  }
  expert = num_experts;
  tile_in_expert = 0;
}

template <typename T>
__device__ __forceinline__ GemmTile<T> locate_tile(const T* a, const T* b, T* c,
                                                   const GroupedGemmShape& shape, int tile_size) {
  __shared__ int shared_expert;
  __shared__ int64_t shared_tile;
  GemmTile<T> tile{};
  int expert = blockIdx.z;
  int64_t row_tile = blockIdx.x;
  if (!shape.ragged_k) {
    if (threadIdx.x < kWarpSize) {
      find_row_tile(shape.offsets, shape.num_experts, blockIdx.x, tile_size, expert, row_tile);
      if (threadIdx.x == 0) {
        shared_expert = expert;
        shared_tile = row_tile;
      }
    }
    __syncthreads();
    expert = shared_expert;
    row_tile = shared_tile;
  }
  tile.valid = expert < shape.num_experts;
  if (!tile.valid) return tile;
  const int64_t begin = shape.offsets[expert];
  const int64_t rows = shape.offsets[expert + 1] - begin;
  const int64_t ragged_a = shape.ragged_k ? shape.a_k : shape.a_m;
  tile.a = a + expert * shape.a_expert + begin * ragged_a;
  tile.b = b + expert * shape.b_expert + (shape.ragged_k ? begin * shape.b_k : 0);
  tile.c = c + expert * shape.c_expert + (shape.ragged_k ? 0 : begin * shape.c_m);
  tile.m_begin = row_tile * tile_size;
  tile.n_begin = static_cast<int64_t>(blockIdx.y) * tile_size;
  tile.m_end = shape.ragged_k ? shape.m : rows;
  tile.n_end = shape.n;
  tile.k_end = shape.ragged_k ? rows : shape.k;
  return tile;
}

// Plain fused multiply-add for float and double. Thread (ty, tx) of 16 x 16 owns kTile/16 x
// kTile/16 values of C.
template <typename T, int kTile, bool kAContiguousK, bool kBContiguousK>
__global__ void __launch_bounds__(256)
    grouped_gemm_simt_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ c,
                             GroupedGemmShape shape) {
  constexpr int kDepth = 16;
  constexpr int kPer = kTile / 16;
  constexpr int kLoads = kTile * kDepth / 256;
  // One element of padding keeps the transposing stores off a single bank.
  __shared__ T tile_a[kDepth][kTile + 1];
  __shared__ T tile_b[kDepth][kTile + 1];
  const GemmTile<T> tile = locate_tile(a, b, c, shape, kTile);
  if (!tile.valid) return;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  T sum[kPer][kPer] = {};
  for (int64_t k0 = 0; k0 < tile.k_end; k0 += kDepth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = threadIdx.x + i * 256;
      const int ma = kAContiguousK ? index / kDepth : index % kTile;
      const int ka = kAContiguousK ? index % kDepth : index / kTile;
      const int nb = kBContiguousK ? index / kDepth : index % kTile;
      const int kb = kBContiguousK ? index % kDepth : index / kTile;
      const int64_t m = tile.m_begin + ma, n = tile.n_begin + nb;
      const bool a_inside = m < tile.m_end && k0 + ka < tile.k_end;
      const bool b_inside = n < tile.n_end && k0 + kb < tile.k_end;
      tile_a[ka][ma] = a_inside ? tile.a[m * shape.a_m + (k0 + ka) * shape.a_k] : T(0);
      tile_b[kb][nb] = b_inside ? tile.b[n * shape.b_n + (k0 + kb) * shape.b_k] : T(0);
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < kDepth; ++kk) {
      T left[kPer], right[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        left[i] = tile_a[kk][ty + 16 * i];
        right[i] = tile_b[kk][tx + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) sum[i][j] += left[i] * right[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int64_t m = tile.m_begin + ty + 16 * i;
    if (m >= tile.m_end) continue;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int64_t n = tile.n_begin + tx + 16 * j;
      if (n < tile.n_end) tile.c[m * shape.c_m + n] = sum[i][j];
    }
  }
}

// Eight half values of a strided matrix as one vector: `major` indexes the dimension that is not
// contiguous.
template <typename T>
__device__ __forceinline__ uint4 load_half_vector(const T* base, int64_t major, int64_t major_end,
                                                  int64_t major_stride, int64_t minor,
                                                  int64_t minor_end, bool wide) {
  uint4 packed = make_uint4(0, 0, 0, 0);
  if (major >= major_end || minor >= minor_end) return packed;
  const T* source = base + major * major_stride + minor;
  if (wide && minor + 8 <= minor_end) return *reinterpret_cast<const uint4*>(source);
  T* values = reinterpret_cast<T*>(&packed);
  for (int i = 0; i < 8; ++i) {
    if (minor + i < minor_end) values[i] = source[i];
  }
  return packed;
}

// Tensor cores (mma through WMMA) for half types. Eight warps as 2 x 4, each owns 64 x 32 of the
// 128 x 128 tile. A tile keeps its memory order in shared memory; the fragment's layout says which
// one that is.
template <typename T, bool kAContiguousK, bool kBContiguousK>
__global__ void __launch_bounds__(256)
    grouped_gemm_mma_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ c,
                            GroupedGemmShape shape, bool wide_a, bool wide_b) {
  namespace wmma = nvcuda::wmma;
  constexpr int kTile = 128, kDepth = 32, kFragment = 16, kPad = 8;
  constexpr int kLoads = kTile * kDepth / 8 / 256;  // vectors per thread and matrix
  constexpr int kStrideA = (kAContiguousK ? kDepth : kTile) + kPad;
  constexpr int kStrideB = (kBContiguousK ? kDepth : kTile) + kPad;
  constexpr int kRowsA = kAContiguousK ? kTile : kDepth;
  constexpr int kRowsB = kBContiguousK ? kTile : kDepth;
  __shared__ __align__(16) T tile_a[kRowsA * kStrideA];
  __shared__ __align__(16) T tile_b[kRowsB * kStrideB];
  __shared__ __align__(16) float staging[8][kFragment * kFragment];

  const GemmTile<T> tile = locate_tile(a, b, c, shape, kTile);
  if (!tile.valid) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;

  using LayoutA = std::conditional_t<kAContiguousK, wmma::row_major, wmma::col_major>;
  using LayoutB = std::conditional_t<kBContiguousK, wmma::col_major, wmma::row_major>;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
  }

  uint4 next_a[kLoads], next_b[kLoads];
  auto fetch = [&](int64_t k0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = (threadIdx.x + i * 256) * 8;
      if constexpr (kAContiguousK) {
        next_a[i] = load_half_vector(tile.a, tile.m_begin + index / kDepth, tile.m_end, shape.a_m,
                                     k0 + index % kDepth, tile.k_end, wide_a);
      } else {
        next_a[i] = load_half_vector(tile.a, k0 + index / kTile, tile.k_end, shape.a_k,
                                     tile.m_begin + index % kTile, tile.m_end, wide_a);
      }
      if constexpr (kBContiguousK) {
        next_b[i] = load_half_vector(tile.b, tile.n_begin + index / kDepth, tile.n_end, shape.b_n,
                                     k0 + index % kDepth, tile.k_end, wide_b);
      } else {
        next_b[i] = load_half_vector(tile.b, k0 + index / kTile, tile.k_end, shape.b_k,
                                     tile.n_begin + index % kTile, tile.n_end, wide_b);
      }
    }
  };
  fetch(0);
  for (int64_t k0 = 0; k0 < tile.k_end; k0 += kDepth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = (threadIdx.x + i * 256) * 8;
      constexpr int kAlongA = kAContiguousK ? kDepth : kTile;
      constexpr int kAlongB = kBContiguousK ? kDepth : kTile;
      *reinterpret_cast<uint4*>(tile_a + index / kAlongA * kStrideA + index % kAlongA) = next_a[i];
      *reinterpret_cast<uint4*>(tile_b + index / kAlongB * kStrideB + index % kAlongB) = next_b[i];
    }
    __syncthreads();
    if (k0 + kDepth < tile.k_end) fetch(k0 + kDepth);
#pragma unroll
    for (int kk = 0; kk < kDepth; kk += kFragment) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, LayoutA> left[4];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, LayoutB> right[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = warp_m + i * kFragment;
        const T* source = kAContiguousK ? tile_a + m * kStrideA + kk : tile_a + kk * kStrideA + m;
        wmma::load_matrix_sync(left[i], source, kStrideA);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = warp_n + j * kFragment;
        const T* source = kBContiguousK ? tile_b + n * kStrideB + kk : tile_b + kk * kStrideB + n;
        wmma::load_matrix_sync(right[j], source, kStrideB);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) wmma::mma_sync(sum[i][j], left[i], right[j], sum[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      wmma::store_matrix_sync(staging[warp], sum[i][j], kFragment, wmma::mem_row_major);
      __syncwarp();
      for (int index = lane; index < kFragment * kFragment; index += kWarpSize) {
        const int64_t m = tile.m_begin + warp_m + i * kFragment + index / kFragment;
        const int64_t n = tile.n_begin + warp_n + j * kFragment + index % kFragment;
        if (m < tile.m_end && n < tile.n_end) {
          tile.c[m * shape.c_m + n] = from_accumulate<T>(staging[warp][index]);
        }
      }
      __syncwarp();
    }
  }
}

// Rows past the last offset become zero. A small grid: usually there is nothing to do.
template <typename T>
__global__ void zero_tail_kernel(T* __restrict__ rows, const int32_t* __restrict__ offsets,
                                 int num_experts, int64_t num_rows, int64_t width) {
  const int64_t begin = live_rows(offsets, num_experts, num_rows) * width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < num_rows * width; i += stride) {
    rows[i] = from_accumulate<T>(0);
  }
}

// rows[r] += bias[expert of r]; one warp owns a row.
template <typename T>
__global__ void add_bias_kernel(T* __restrict__ rows, const T* __restrict__ bias,
                                const int32_t* __restrict__ offsets, int num_experts,
                                int64_t num_rows, int64_t width) {
  const int64_t live = live_rows(offsets, num_experts, num_rows);
  const int warps = blockDim.x / kWarpSize;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / kWarpSize; row < live;
       row += static_cast<int64_t>(gridDim.x) * warps) {
    const T* own = bias + expert_of_row(offsets, num_experts, row) * width;
    for (int64_t c = threadIdx.x % kWarpSize; c < width; c += kWarpSize) {
      T& value = rows[row * width + c];
      value = from_accumulate<T>(to_accumulate(value) + to_accumulate(own[c]));
    }
  }
}

// Sums of rows per expert, in two steps of fixed order. A tile is kSumTile consecutive rows of one
// expert; short runs also keep a long sum from swallowing its addends.
constexpr int kSumTile = 128;
constexpr int kSumRowLanes = 8;

template <typename T>
struct GroupedSumArgs {
  using Acc = device_accumulate_t<T>;
  const T* rows;
  const int32_t* offsets;
  int num_experts;
  int64_t width;
  // With row_to_pair, row r is topk_weights[pair] * rows[pair / top_k]: a gather that is never
  // written out.
  const int32_t* row_to_pair;
  const Acc* topk_weights;
  int top_k;
  int64_t num_pairs;
  Acc* partial;  // [tiles, width]
};

// partial[tile, c]: block (tile, columns), 8 row lanes x 32 column lanes of kElements columns each.
template <typename T, int kElements>
__global__ void __launch_bounds__(256) grouped_sum_tiles_kernel(const GroupedSumArgs<T> args) {
  using Acc = device_accumulate_t<T>;
  using Vec = Vector<T, kElements>;
  __shared__ Acc lane_sums[kSumRowLanes][kWarpSize * kElements];
  const int lane = threadIdx.x % kWarpSize, row_lane = threadIdx.x / kWarpSize;
  int expert;
  int64_t tile;
  find_row_tile(args.offsets, args.num_experts, blockIdx.x, kSumTile, expert, tile);
  if (expert == args.num_experts) return;
  const int64_t begin = args.offsets[expert] + tile * kSumTile;
  const int64_t end = min(begin + kSumTile, static_cast<int64_t>(args.offsets[expert + 1]));
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * kWarpSize + lane) * kElements;
  Acc sum[kElements] = {};
  if (c < args.width) {
#pragma unroll 4
    for (int64_t r = begin + row_lane; r < end; r += kSumRowLanes) {
      int64_t source = r;
      Acc weight = 1;
      if (args.row_to_pair != nullptr) {
        const int64_t pair = args.row_to_pair[r];
        if (pair < 0 || pair >= args.num_pairs) continue;
        source = pair / args.top_k;
        weight = args.topk_weights[pair];
      }
      const Vec value = load_vector<Vec>(args.rows + source * args.width + c);
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum[i] += weight * to_accumulate(value.value[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) lane_sums[row_lane][i * kWarpSize + lane] = sum[i];
  __syncthreads();
  // All threads add up the row lanes, neighbouring threads neighbouring columns.
  for (int column = threadIdx.x; column < kWarpSize * kElements; column += blockDim.x) {
    const int64_t target = static_cast<int64_t>(blockIdx.y) * kWarpSize * kElements + column;
    if (target >= args.width) continue;
    const int place = column % kElements * kWarpSize + column / kElements;
    Acc total = 0;
#pragma unroll
    for (int i = 0; i < kSumRowLanes; ++i) total += lane_sums[i][place];
    args.partial[blockIdx.x * args.width + target] = total;
  }
}

// out[e, c] = the sum of the expert's tiles. Block (columns, e); one thread owns a column.
template <typename T>
__global__ void __launch_bounds__(256)
    grouped_sum_total_kernel(const device_accumulate_t<T>* __restrict__ partial,
                             const int32_t* __restrict__ offsets, int64_t width,
                             T* __restrict__ out) {
  using Acc = device_accumulate_t<T>;
  __shared__ int64_t first_tile;
  const int expert = blockIdx.y;
  if (threadIdx.x < kWarpSize) {
    int64_t before = 0;
    for (int e = threadIdx.x; e < expert; e += kWarpSize) {
      before += (offsets[e + 1] - offsets[e] + kSumTile - 1) / kSumTile;
    }
    before = warp_sum(before);
    if (threadIdx.x == 0) first_tile = before;
  }
  __syncthreads();
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= width) return;
  const int64_t tiles = (offsets[expert + 1] - offsets[expert] + kSumTile - 1) / kSumTile;
  const Acc* own = partial + first_tile * width + c;
  Acc sum = 0;
  for (int64_t first = 0; first < tiles; first += kSumTile) {
    const int64_t last = min(first + kSumTile, tiles);
    Acc run = 0;
#pragma unroll 8
    for (int64_t tile = first; tile < last; ++tile) run += own[tile * width];
    sum += run;
  }
  out[expert * width + c] = from_accumulate<T>(sum);
}

}  // namespace moeops
