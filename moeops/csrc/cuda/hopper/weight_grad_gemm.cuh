// Products over a ragged reduction: out[e, m, n] = sum over rows r of expert e of P[r, m] Q[r, n].
//
// Both operands lie with k (the rows) across their lines. One of them may be gathered by a plan.
// The roles are those of rows_gemm.cuh; two warpgroups produce where one could not gather fast
// enough, and share the rows of every k block. In clusters of two, neighbours along the gathered
// operand share the other one: each loads half of it for both.
//
// Whole blocks of 64 rows of the operand in place come by the copy engine. The last, partial block
// of an expert is copied by threads with zeros past its end, for both operands: a neighbour's rows
// would bring 0 * NaN. Experts without rows get zeros.
#pragma once

#include "hopper/common.cuh"

namespace moeops::hopper {

enum class Gathered { kNone, kP, kQ };

struct WeightGradArgs {
  const void *p, *q;
  RowSource source;  // of the gathered operand
  const int32_t* offsets;
  int num_experts, m, n, m_tiles, n_tiles;
  int group;  // tiles of m that are visited together
};

struct WeightGradMaps {
  CUtensorMap p, q, out;
};

template <int kColumns_, bool kPingpong_, int kProducers_, int kCluster_>
struct WeightGradTile {
  static constexpr int kRows = 128, kColumns = kColumns_;
  static constexpr int kProducers = kProducers_, kCluster = kCluster_;
  static constexpr bool kPingpong = kPingpong_;
  static constexpr int kBlocks = kPingpong ? 2 : 1;  // blocks of 64 rows of a consumer
};

template <typename T_, class Tile_, Gathered kGathered_>
struct WeightGradConfig {
  using T = T_;
  using Tile = Tile_;
  static constexpr int kEpilogueBytes = 2 * kOutputChunkBytes;
  using Plan = SharedPlan<Tile::kRows, Tile::kColumns, kEpilogueBytes>;
  static constexpr Gathered kGathered = kGathered_;
  static constexpr int kThreads = (2 + Tile::kProducers) * kWarpgroup;
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kProducerRegisters = Tile::kProducers == 1 ? 56 : 32;
  static_assert(Tile::kCluster == 1 || kGathered != Gathered::kNone,
                "a cluster shares the operand that is not gathered");
  static_assert(Tile::kColumns / 32 % 2 == 0, "output chunks take turns in two buffers");
};

// 64 rows x 64 kGroups columns into a tile. `even` and `odd`: where this thread's chunk of its rows
// 0, 2 and 1, 3 lies. `left`: columns from this thread's first one to the matrix' last one.
template <int kGroups, bool kInside, int kSteps>
__device__ __forceinline__ void copy_rows(uint32_t even, uint32_t odd, const char* base,
                                          uint32_t pitch, const int (&row)[kSteps], int left) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const char* line = base + static_cast<uint64_t>(static_cast<uint32_t>(row[i])) * pitch;
    const uint32_t to = ((i & 1) ? odd : even) + (i >> 1) * 1024;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const uint32_t at = to + j * kColumnBlockBytes;
      if constexpr (kInside) {
        copy_async(at, line + j * 128);
      } else {
        copy_async(at, line + j * 128, j * 64 >= left);
      }
    }
  }
}

// The same for a partial block, whose rows past the end (below 0) become zeros.
template <int kGroups, int kSteps>
__device__ __forceinline__ void copy_last_rows(uint32_t even, uint32_t odd, const char* base,
                                               uint32_t pitch, const int (&row)[kSteps], int left) {
#pragma unroll 1
  for (int i = 0; i < kSteps; ++i) {
    // Selects instead of row[i], which would move the array to local memory.
    const int r = i == 0 ? row[0] : i == 1 ? row[1] : i == 2 ? row[2 % kSteps] : row[3 % kSteps];
    const char* line = base + static_cast<uint64_t>(static_cast<uint32_t>(max(r, 0))) * pitch;
    const uint32_t to = ((i & 1) ? odd : even) + (i >> 1) * 1024;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      copy_async(to + j * kColumnBlockBytes, line + j * 128, r < 0 || j * 64 >= left);
    }
  }
}

template <class Config>
struct WeightGradGemm : PersistentCta<typename Config::Tile, typename Config::Plan> {
  using T = typename Config::T;
  using Tile = typename Config::Tile;
  using Plan = typename Config::Plan;
  using Cta = PersistentCta<Tile, Plan>;
  using Cta::full, Cta::empty, Cta::turn, Cta::first_tile, Cta::second_tile, Cta::release;
  using Cta::kCluster, Cta::kStages, Cta::rank, Cta::grid, Cta::block, Cta::base;
  static constexpr int kProducers = Tile::kProducers;
  static constexpr bool kPingpong = Tile::kPingpong;
  static constexpr Gathered kGathered = Config::kGathered;
  static constexpr bool kGather = kGathered != Gathered::kNone;

  struct Spot {
    int expert, m, n;
    Pairing pairing;
  };

  const WeightGradArgs& args;
  const WeightGradMaps& maps;
  const int units_per_expert, total;

  __device__ __forceinline__ WeightGradGemm(const WeightGradArgs& args, const WeightGradMaps& maps,
                                            uint32_t base)
      : Cta(base),
        args(args),
        maps(maps),
        units_per_expert(kCluster == 1               ? args.m_tiles * args.n_tiles
                         : kGathered == Gathered::kQ ? args.n_tiles * ((args.m_tiles + 1) >> 1)
                                                     : args.m_tiles * ((args.n_tiles + 1) >> 1)),
        total(units_per_expert * args.num_experts) {}

  // By one thread: the tensor copies' announcement, and every producing thread's own copies.
  __device__ __forceinline__ void init_barriers() const {
    Cta::init_stages(1 + kProducers * kWarpgroup);
    for (int c = 0; c < 2; ++c) barrier_init(turn(c), 4);
    barrier_init_fence();
  }

  __device__ __forceinline__ Spot locate(int t) const {
    Spot spot{t / units_per_expert, 0, 0, Pairing::kSeparate};
    const int unit = t - spot.expert * units_per_expert;
    if constexpr (kCluster == 1) {
      tile_in_groups(unit, args.m_tiles, args.n_tiles, args.group, spot.m, spot.n);
    } else if constexpr (kGathered == Gathered::kQ) {
      spot.pairing =
          pair_in_group(unit, args.m_tiles, group_word(0, args.n_tiles), rank, spot.n, spot.m);
    } else {
      spot.pairing =
          pair_in_group(unit, args.n_tiles, group_word(0, args.m_tiles), rank, spot.m, spot.n);
    }
    return spot;
  }
  __device__ __forceinline__ int blocks_of(int expert) const {
    return (args.offsets[expert + 1] - args.offsets[expert] + kDepth - 1) / kDepth;
  }

  // What the producers do.

  // What is not gathered of a whole k block from row `row` on. Halves are 32 of the 64 rows.
  __device__ __forceinline__ void load_in_place(int stage, const Spot& spot, int row) const {
    const uint32_t barrier = full(stage);
    const auto load = [&](uint32_t to, const CUtensorMap* map, int column, auto blocks) {
      constexpr int kBlocks = decltype(blocks)::value;
      if constexpr (kCluster == 1) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          tensor_load(to + j * kColumnBlockBytes, map, barrier, column + j * 64, row);
        }
      } else {
        const bool shared = spot.pairing == Pairing::kShared;
#pragma unroll 1
        for (int half = shared ? rank : 0; half < (shared ? rank + 1 : 2); ++half) {
#pragma unroll
          for (int j = 0; j < kBlocks; ++j) {
            const uint32_t at = to + j * kColumnBlockBytes + half * kColumnBlockBytes / 2;
            if (shared) {
              tensor_load_pair(at, map, barrier, column + j * 64, row + half * 32);
            } else {
              tensor_load(at, map, barrier, column + j * 64, row + half * 32);
            }
          }
        }
      }
    };
    barrier_arrive_expect(barrier, (kGathered != Gathered::kP ? Plan::kA : 0) +
                                       (kGathered != Gathered::kQ ? Plan::kB : 0));
    if constexpr (kGathered != Gathered::kP) {
      load(first_tile(stage), &maps.p, spot.m * Tile::kRows,
           std::integral_constant<int, Tile::kRows / 64>{});
    }
    if constexpr (kGathered != Gathered::kQ) {
      load(second_tile(stage), &maps.q, spot.n * Tile::kColumns,
           std::integral_constant<int, Tile::kColumns / 64>{});
    }
  }

  // Row numbers are read one per lane for kAhead k blocks at a time, as many blocks ahead, and
  // dealt out by shuffles: the inner loop is one shuffle and one multiplication per row.
  __device__ __forceinline__ void produce(int producer) const {
    give_registers<Config::kProducerRegisters>();
    constexpr int kRowsPerWarp = 16 / kProducers, kSteps = kRowsPerWarp / 4;
    constexpr int kAhead = kWarpSize / kRowsPerWarp;
    constexpr int kRowGroups = Tile::kRows / 64, kColumnGroups = Tile::kColumns / 64;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = __shfl_sync(kFullMask, threadIdx.x % kWarpgroup / kWarpSize, 0) + 4 * producer;
    // This thread copies chunk `chunk` of rows first_row + 4 i of a k block.
    const int chunk = lane & 7, first_row = kRowsPerWarp * warp + (lane >> 3);
    const uint32_t even = operand_chunk(first_row, chunk),
                   odd = operand_chunk(first_row + 4, chunk);
    const uint32_t pitch_p = args.m * sizeof(T), pitch_q = args.n * sizeof(T);
    Ring<kStages> ring;
    for (int t = block; t < total; t += grid) {
      const Spot spot = locate(t);
      const int begin = args.offsets[spot.expert], end = args.offsets[spot.expert + 1];
      const int blocks =
          spot.pairing == Pairing::kNothing ? 0 : (end - begin + kDepth - 1) / kDepth;
      const int column_p = spot.m * Tile::kRows + chunk * 8;
      const int column_q = spot.n * Tile::kColumns + chunk * 8;
      const char* from_p = reinterpret_cast<const char*>(static_cast<const T*>(args.p) + column_p);
      const char* from_q = reinterpret_cast<const char*>(static_cast<const T*>(args.q) + column_q);
      const int left_p = args.m - column_p, left_q = args.n - column_q;
      const bool inside = kGathered == Gathered::kP ? (spot.m + 1) * Tile::kRows <= args.m
                                                    : (spot.n + 1) * Tile::kColumns <= args.n;
      // Pairs, and not yet tokens: nothing may wait for the load before the blocks until then are
      // done.
      const auto load_pair = [&](int b) {
        const int row =
            begin + (b + lane / kRowsPerWarp) * kDepth + kRowsPerWarp * warp + lane % kRowsPerWarp;
        return args.source.row_to_pair[min(row, end - 1)];
      };
      int numbers = 0, ahead = 0;
      if (kGather && blocks > 0) ahead = load_pair(0);
#pragma unroll 1
      for (int b0 = 0; b0 < blocks; b0 += kAhead) {
        if constexpr (kGather) {
          numbers = args.source.token_of_pair(ahead);
          ahead = load_pair(b0 + kAhead);
        }
#pragma unroll 1
        for (int b = b0; b < min(b0 + kAhead, blocks); ++b) {
          int gathered[kSteps] = {};
          if constexpr (kGather) {
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
              const int owner = b % kAhead * kRowsPerWarp + (lane >> 3) + 4 * i;
              gathered[i] = __shfl_sync(kFullMask, numbers, owner);
            }
          }
          const int row = begin + b * kDepth;
          const int stage = ring.stage;
          barrier_wait(empty(stage), ring.parity ^ 1, Waiting::kForEmptyStage, stage);
          const bool whole = row + kDepth <= end;
          // The tensor copies go round the warps.
          if (warp == (kGather ? b % (4 * kProducers) : 0) && lane == 0) {
            if (whole) {
              load_in_place(stage, spot, row);
            } else {
              barrier_arrive(full(stage));
            }
          }
          const uint32_t p = first_tile(stage), q = second_tile(stage);
          if (!whole) {
            int in_place[kSteps];
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
              const int r = row + first_row + 4 * i;
              in_place[i] = r < end ? r : -1;
              if (r >= end) gathered[i] = -1;
            }
            copy_last_rows<kRowGroups>(p + even, p + odd, from_p, pitch_p,
                                       kGathered == Gathered::kP ? gathered : in_place, left_p);
            copy_last_rows<kColumnGroups>(q + even, q + odd, from_q, pitch_q,
                                          kGathered == Gathered::kQ ? gathered : in_place, left_q);
          } else if constexpr (kGathered == Gathered::kP) {
            if (inside) {
              copy_rows<kRowGroups, true>(p + even, p + odd, from_p, pitch_p, gathered, left_p);
            } else {
              copy_rows<kRowGroups, false>(p + even, p + odd, from_p, pitch_p, gathered, left_p);
            }
          } else if constexpr (kGathered == Gathered::kQ) {
            if (inside) {
              copy_rows<kColumnGroups, true>(q + even, q + odd, from_q, pitch_q, gathered, left_q);
            } else {
              copy_rows<kColumnGroups, false>(q + even, q + odd, from_q, pitch_q, gathered, left_q);
            }
          }
          copy_async_arrive(full(stage));  // at once, where this thread copied nothing
          ring.next();
        }
      }
    }
    copy_async_wait_all();
  }

  // What the consumers do.

  // k blocks of unit t: as many as its expert has, none where there is nothing to do.
  __device__ __forceinline__ int k_blocks(int t) const {
    if (t >= total) return 0;
    const Spot spot = locate(t);
    return spot.pairing == Pairing::kNothing ? 0 : blocks_of(spot.expert);
  }

  __device__ __forceinline__ void multiply(float (&sum)[Tile::kBlocks][Tile::kColumns / 2],
                                           int k_blocks, int consumer, Ring<kStages>& ring,
                                           uint32_t peer_barriers) const {
    int previous = -1;
    for (int kb = 0; kb < k_blocks; ++kb) {
      barrier_wait(full(ring.stage), ring.parity, Waiting::kForFullStage, ring.stage);
      fence_shared();  // gathered values were written by ordinary copies
#pragma unroll
      for (int m = 0; m < Tile::kBlocks; ++m) hold(sum[m]);
      product_fence();
#pragma unroll
      for (int kk = 0; kk < kDepth / 16; ++kk) {
        const uint64_t q = operand(second_tile(ring.stage) + kk * 16 * 128, kColumnBlockBytes);
#pragma unroll
        for (int m = 0; m < Tile::kBlocks; ++m) {
          const int column_block = (kPingpong ? 0 : consumer * Tile::kBlocks) + m;
          const uint32_t p =
              first_tile(ring.stage) + column_block * kColumnBlockBytes + kk * 16 * 128;
          product<T, 1, 1>(sum[m], operand(p, kColumnBlockBytes), q, kk > 0 ? 1 : kb);
        }
      }
      product_commit();
#pragma unroll
      for (int m = 0; m < Tile::kBlocks; ++m) hold(sum[m]);
      product_wait<1>();  // the stage before this one has been read
      if (previous >= 0) release(previous, peer_barriers);
      previous = ring.stage;
      ring.next();
    }
    if constexpr (kPingpong) {
      if (threadIdx.x % kWarpSize == 0) barrier_arrive(turn(consumer ^ 1));
    }
    product_wait<0>();
#pragma unroll
    for (int m = 0; m < Tile::kBlocks; ++m) hold(sum[m]);
    if (previous >= 0) release(previous, peer_barriers);
  }

  __device__ __forceinline__ void consume(int consumer) const {
    take_registers<Config::kConsumerRegisters>();
    const uint32_t peer_barriers = Cta::peer_barriers();
    Ring<kStages> ring;
    int turn_parity = consumer ^ 1;  // the first turn of the first consumer is free
    int t = block;
    if (kPingpong && consumer == 1) {
      ring.skip(k_blocks(t));
      t += grid;
    }
    for (; t < total; t += (kPingpong ? 2 : 1) * grid) {
      const int own = k_blocks(t), others = kPingpong ? k_blocks(t + grid) : 0;
      float sum[Tile::kBlocks][Tile::kColumns / 2];
      if (own == 0) {
#pragma unroll
        for (int m = 0; m < Tile::kBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < Tile::kColumns / 2; ++i) sum[m][i] = 0;
        }
      }
      if constexpr (kPingpong) {
        barrier_wait(turn(consumer), turn_parity, Waiting::kForTurn, consumer);
        turn_parity ^= 1;
      }
      multiply(sum, own, consumer, ring, peer_barriers);
      if constexpr (kPingpong) ring.skip(others);
      write_tile(sum, consumer, locate(t));
    }
    if (threadIdx.x % kWarpgroup == 0) store_wait_all();
  }

  // Units without work write past the matrix, which the copy engine drops.
  __device__ __forceinline__ void write_tile(float (&sum)[Tile::kBlocks][Tile::kColumns / 2],
                                             int consumer, const Spot& spot) const {
    const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarpSize;
    const int warp = thread / kWarpSize;
    const uint32_t buffers = base + Plan::kOffsetEpilogue + consumer * Config::kEpilogueBytes;
#pragma unroll
    for (int m = 0; m < Tile::kBlocks; ++m) {
#pragma unroll
      for (int chunk = 0; chunk < Tile::kColumns / 32; ++chunk) {
        const uint32_t buffer = buffers + (chunk & 1) * kOutputChunkBytes;
        if (thread == 0) store_wait_read<1>();
        named_barrier(1 + consumer, kWarpgroup);  // the buffer is free
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const float* own = sum[m] + (chunk * 4 + j) * 4;
          store_matrices(buffer + output_lane(warp, lane, j), pack<T>(own[0], own[1]),
                         pack<T>(own[2], own[3]), pack<T>(own[4], own[5]), pack<T>(own[6], own[7]));
        }
        fence_shared();
        named_barrier(1 + consumer, kWarpgroup);
        if (thread == 0) {
          const int block = (kPingpong ? 0 : consumer * Tile::kBlocks) + m;
          tensor_store(&maps.out, buffer, spot.n * Tile::kColumns + chunk * 32,
                       spot.m * Tile::kRows + block * 64, spot.expert);
          store_commit();
        }
      }
    }
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    weight_grad_kernel(const __grid_constant__ WeightGradArgs args,
                       const __grid_constant__ WeightGradMaps maps) {
  extern __shared__ uint8_t memory[];
  const WeightGradGemm<Config> gemm(
      args, maps, (shared_address(memory) + kAlignBytes - 1) & ~(kAlignBytes - 1u));
  if (threadIdx.x == 0) gemm.init_barriers();
  if constexpr (Config::Tile::kCluster == 2) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  constexpr int kProducers = Config::Tile::kProducers;
  // A shuffle tells the compiler that the role is the same in all lanes of a warp.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  if (warpgroup < kProducers) {
    gemm.produce(warpgroup);
  } else {
    gemm.consume(warpgroup - kProducers);
  }
  // Nobody leaves while the peer may still arrive at its barriers or write into its stages.
  if constexpr (Config::Tile::kCluster == 2) cluster_barrier();
}

}  // namespace moeops::hopper
