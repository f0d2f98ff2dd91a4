// What the two kernel bodies share: the plan of shared memory, conversions, division by top_k, the
// walk over stages, the launch.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <mutex>

#include "common.h"
#include "hopper/layouts.cuh"
#include "hopper/ptx.cuh"
#include "hopper/wgmma.cuh"
#include "kernels/vector.cuh"

namespace moeops::hopper {

constexpr int kWarpgroup = 128;  // threads
constexpr int kDepth = 64;       // values of k in a stage: one 128-byte line
constexpr int kRowTile = 128;    // rows of a tile of ragged rows
constexpr int kMaxSharedBytes = 232448;
constexpr int kAlignBytes = 1024;  // of operand tiles, for the swizzle

// Two neighbouring values as one 32-bit word, and back.
template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    word = *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(a, b);
    word = *reinterpret_cast<const uint32_t*>(&v);
  }
  return word;
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
}

// Division of 0 <= n < 2^31 by a number that the host knows, as a multiplication.
struct Divider {
  uint32_t multiplier = 0, shift = 0;

  explicit Divider(int divisor) {
    if (divisor == 1) return;
    uint32_t bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    const uint64_t power = uint64_t{1} << (31 + bits);
    multiplier = static_cast<uint32_t>((power + divisor - 1) / divisor);
    shift = bits - 1;
  }
  __device__ __forceinline__ int operator()(int n) const {
    return multiplier == 0 ? n : static_cast<int>(__umulhi(n, multiplier) >> shift);
  }
};

// Which rows of x the rows in expert order are. A plan with values out of range must not lead
// outside x.
struct RowSource {
  const int32_t* row_to_pair;
  Divider top_k;
  int num_pairs;

  __device__ __forceinline__ int clamp(int pair) const {
    return static_cast<int>(min(static_cast<unsigned>(pair), num_pairs - 1u));
  }
  __device__ __forceinline__ int pair(int row) const { return clamp(row_to_pair[row]); }
  __device__ __forceinline__ int token_of_pair(int pair) const { return top_k(clamp(pair)); }
  __device__ __forceinline__ int token(int row) const { return token_of_pair(row_to_pair[row]); }
};

// Stages of operands, buffers for the epilogue of each of the two consumer warpgroups, barriers.
template <int kRows, int kColumns, int kEpilogueBytes>
struct SharedPlan {
  static constexpr int kA = kRows * kDepth * 2, kB = kColumns * kDepth * 2;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kStages =
      (kMaxSharedBytes - kAlignBytes - kBarrierBytes - 2 * kEpilogueBytes) / (kA + kB);
  static constexpr int kOffsetB = kStages * kA;
  static constexpr int kOffsetEpilogue = kOffsetB + kStages * kB;
  static constexpr int kOffsetBarriers = kOffsetEpilogue + 2 * kEpilogueBytes;
  static constexpr int kBytes = kOffsetBarriers + kBarrierBytes + kAlignBytes;
  static_assert(kStages >= 3, "fewer stages would leave the tensor cores waiting for copies");
  static_assert(16 * kStages + 16 + 48 <= kBarrierBytes, "two barriers per stage and eight more");
};

// Position in the ring of stages, and the parity of the phase there.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ void skip(int count) {
    stage += count;
    parity ^= (stage / kStages) & 1;
    stage %= kStages;
  }
};

// What every thread of a persistent CTA knows: its place in the grid of CTAs or pairs, and where
// the stages and their barriers lie.
template <class Tile, class Plan>
struct PersistentCta {
  static constexpr int kCluster = Tile::kCluster, kStages = Plan::kStages;

  const uint32_t base, barriers;
  const int rank, grid, block;  // rank in the pair; pairs, and which of them

  __device__ __forceinline__ explicit PersistentCta(uint32_t base)
      : base(base),
        barriers(base + Plan::kOffsetBarriers),
        rank(kCluster == 2 ? cluster_rank() : 0),
        grid(gridDim.x / kCluster),
        block(blockIdx.x / kCluster) {}

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return barriers + 8 * (kStages + stage);
  }
  __device__ __forceinline__ uint32_t turn(int consumer) const {
    return barriers + 8 * (2 * kStages + consumer);
  }
  // The operands of a stage, A or P and W or Q.
  __device__ __forceinline__ uint32_t first_tile(int stage) const {
    return base + stage * Plan::kA;
  }
  __device__ __forceinline__ uint32_t second_tile(int stage) const {
    return base + Plan::kOffsetB + stage * Plan::kB;
  }

  // By one thread. `producers`: arrivals that fill a stage. An empty one has an arrival of every
  // warp that read it, in both CTAs of a pair.
  __device__ __forceinline__ void init_stages(int producers) const {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full(s), producers);
      barrier_init(empty(s), kCluster * (Tile::kPingpong ? 4 : 8));
    }
  }

  // The barriers of both CTAs of a pair, of which lanes take turns.
  __device__ __forceinline__ uint32_t peer_barriers() const {
    return kCluster == 2 ? address_in(barriers, threadIdx.x % kWarpSize & 1) : 0;
  }
  // One arrival per warp at each CTA that filled the stage.
  __device__ __forceinline__ void release(int stage, uint32_t peer_barriers) const {
    const int lane = threadIdx.x % kWarpSize;
    if constexpr (kCluster == 2) {
      if (lane < 2) barrier_arrive_cluster(peer_barriers + 8 * (kStages + stage));
    } else {
      if (lane == 0) barrier_arrive(empty(stage));
    }
  }
};

// Grid of one CTA per multiprocessor, in clusters. Programmatic dependent launch lost 5 % here:
// CTAs then land on multiprocessors in the order in which the kernel before frees them, and those
// that read the same lines are no longer in step.
template <auto kKernel, int kCluster, int kSharedBytes, typename... Args>
void launch_persistent(int device, int threads, cudaStream_t stream, const Args&... args) {
  const int num_sms = device_limits(device).num_sms;
  static std::array<std::once_flag, kMaxDevices> allowed;
  std::call_once(allowed[device], [] { allow_shared_bytes(kKernel, kSharedBytes); });
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_sms / kCluster * kCluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = kCluster > 1 ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, args...));
}

}  // namespace moeops::hopper
