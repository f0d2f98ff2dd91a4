// Products over ragged rows: out[r, n] = sum_k A[r, k] W[expert of r, n, k].
//
// A CTA of three warpgroups per multiprocessor: one produces, that is copies operands into a ring
// of stages, two consume, that is multiply and write. Pingpong: each consumer owns a whole tile,
// and the two take turns on the tensor cores, so that one's epilogue runs beside the other's
// products. Cooperative: they split the rows of one tile. A is read in place or gathered by a plan;
// W lies with k along its rows or across them. Clusters of two CTAs work on neighbouring row tiles
// of the same columns, each loads half of the W tile for both.
//
// Rows: tiles come from the row-tile table (row_tiles.cuh). Blocks of 64 rows without a live row
// are not multiplied unless `whole_tiles` says so. Whole blocks leave by the copy engine, ragged
// ones by stores of 16 bytes below the expert's end, so that nothing past it is ever written.
#pragma once

#include "hopper/common.cuh"
#include "hopper/epilogue.cuh"

namespace moeops::hopper {

struct RowsArgs {
  const void* a;
  RowSource source;  // of gathered rows
  const int4* tiles;
  const int* num_tiles;
  EpilogueArgs epilogue;
  int group_kind;  // which group word of the table
  int k, n, n_tiles, k_blocks;
  bool whole_tiles;
};

struct RowsMaps {
  CUtensorMap a, w, out, hidden, pre;
};

template <int kColumns_, bool kPingpong_, int kCluster_>
struct RowsTile {
  static constexpr int kColumns = kColumns_, kCluster = kCluster_;
  static constexpr bool kPingpong = kPingpong_;
  static constexpr int kBlocks = kPingpong ? 2 : 1;  // blocks of 64 rows of a consumer
};

template <typename T_, class Tile_, Epilogue kEpilogue_, Activation kActivation_, bool kGather_,
          bool kAcross_>
struct RowsConfig {
  using T = T_;
  using Tile = Tile_;
  using Out = EpilogueShape<kEpilogue_, kActivation_, Tile::kColumns, Tile::kPingpong>;
  using Plan = SharedPlan<kRowTile, Tile::kColumns, Out::kBytes>;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr Activation kActivation = kActivation_;
  static constexpr bool kGather = kGather_;
  static constexpr bool kAcross = kAcross_;  // W has k across its rows: [E, K, N]
  static constexpr bool kBackward = kEpilogue == Epilogue::kActivationBackward;
  // Of a W tile that holds gate columns, then up columns; all others are one piece.
  static constexpr bool kTwoHalves =
      kEpilogue == Epilogue::kActivation && Out::kParts == 2 && !Out::kInTurns;
  static_assert(!kTwoHalves || !kAcross || Out::kColumns % 64 == 0,
                "gate and up are whole blocks of 64 columns where k runs across the rows of W");
  // What the compiler needs without spilling, of 64 K registers in all.
  static constexpr bool kTight =
      (kBackward && Tile::kColumns == 192) || (!kGather && kAcross && Tile::kCluster == 2);
  static constexpr int kConsumerRegisters = kTight ? 232 : kGather ? 224 : 240;
  static constexpr int kProducerRegisters = kTight ? 40 : kGather ? 56 : 24;
};

template <class Config>
struct RowsGemm : PersistentCta<typename Config::Tile, typename Config::Plan> {
  using T = typename Config::T;
  using Tile = typename Config::Tile;
  using Out = typename Config::Out;
  using Plan = typename Config::Plan;
  using Cta = PersistentCta<Tile, Plan>;
  using Cta::full, Cta::empty, Cta::turn, Cta::first_tile, Cta::second_tile, Cta::release;
  using Cta::kCluster, Cta::kStages, Cta::rank, Cta::grid, Cta::block, Cta::base;
  static constexpr bool kPingpong = Tile::kPingpong, kGather = Config::kGather;

  struct Spot {
    int expert, row, rows, n;  // n: which tile of columns
    Pairing pairing;
  };

  const RowsArgs& args;
  const RowsMaps& maps;
  int total, units_per_tile;

  __device__ __forceinline__ RowsGemm(const RowsArgs& args, const RowsMaps& maps, uint32_t base)
      : Cta(base), args(args), maps(maps) {}

  __device__ __forceinline__ uint32_t pre_full(int consumer) const {
    return Cta::barriers + 8 * (2 * kStages + 2 + kPreSlots * consumer);
  }

  // By one thread. A full stage has the bytes of the tensor copies and an arrival of each gathering
  // thread.
  __device__ __forceinline__ void init_barriers() const {
    Cta::init_stages(kGather ? 1 + kWarpgroup : 1);
    for (int c = 0; c < 2; ++c) {
      barrier_init(turn(c), 4);
      if constexpr (Config::kBackward) {
        for (int slot = 0; slot < kPreSlots; ++slot) barrier_init(pre_full(c) + 8 * slot, 1);
      }
    }
    barrier_init_fence();
  }

  __device__ __forceinline__ void read_table() {
    units_per_tile = kCluster == 2 ? (args.n_tiles + 1) >> 1 : args.n_tiles;
    total = *args.num_tiles * units_per_tile;
  }

  __device__ __forceinline__ int group_of(int row_tile) const {
    const int4* entry = args.tiles + row_tile;
    return args.group_kind == 0 ? entry->z : entry->w;
  }
  __device__ __forceinline__ Spot locate(int t) const {
    int m, n;
    Pairing pairing = Pairing::kSeparate;
    const int word = group_of(t / units_per_tile);
    if constexpr (kCluster == 2) {
      pairing = pair_in_group(t, args.n_tiles, word, rank, m, n);
    } else {
      row_tile_in_group(t, args.n_tiles, word, m, n);
    }
    const int4 entry = args.tiles[m];
    return {entry.x & 0xFFFFFF, entry.y, static_cast<int>(static_cast<unsigned>(entry.x) >> 24), n,
            pairing};
  }
  // The first unit from t on that has work, the same one for both CTAs of a pair.
  __device__ __forceinline__ int with_work(int t) const {
    if constexpr (kCluster == 2) {
      if (args.n_tiles & 1) {
        int m, n;
        while (t < total && pair_in_group(t, args.n_tiles, group_of(t / units_per_tile), 0, m, n) ==
                                Pairing::kNothing) {
          t += grid;
        }
      }
    }
    return t;
  }

  // What the producer does.

  // The W tile of k block `kb`, or this CTA's half of it for both CTAs of a pair.
  __device__ __forceinline__ void load_w(int stage, const Spot& spot, int kb) const {
    const uint32_t to = second_tile(stage), barrier = full(stage);
    const int k = kb * kDepth;
    const int column = spot.n * (Config::kTwoHalves ? Out::kColumns : Tile::kColumns);
    const bool shared = spot.pairing == Pairing::kShared;
    const auto load = [&](uint32_t at, auto... coordinates) {
      if constexpr (kCluster == 2) {
        if (shared) return tensor_load_pair(at, &maps.w, barrier, coordinates...);
      }
      tensor_load(at, &maps.w, barrier, coordinates...);
    };
    if constexpr (kCluster == 1 && !Config::kAcross) {
      if constexpr (Config::kTwoHalves) {
        load(to, k, column, 0, spot.expert);  // one box: gate rows, then up rows
      } else {
        load(to, k, column, spot.expert);
      }
    } else if constexpr (kCluster == 1 && Tile::kColumns % 128 != 0) {
#pragma unroll
      for (int j = 0; j < Tile::kColumns / 64; ++j) {
        load(to + j * kColumnBlockBytes, column + j * 64, k, spot.expert);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kCluster == 2 && shared && half != rank) continue;
        load_half(to, half, k, column, spot.expert, load);
      }
    }
  }

  template <typename Load>
  __device__ __forceinline__ void load_half(uint32_t to, int half, int k, int column, int expert,
                                            const Load& load) const {
    constexpr int kColumns = Tile::kColumns, kHalf = Plan::kB / 2;
    if constexpr (!Config::kAcross && Config::kTwoHalves) {
      load(to + half * kHalf, k, column, half, expert);
    } else if constexpr (!Config::kAcross) {
      load(to + half * kHalf, k, column + half * kColumns / 2, expert);
    } else if constexpr (kColumns % 128 == 0) {
      // Blocks of 64 columns, which make whole halves.
#pragma unroll
      for (int j = 0; j < kColumns / 128; ++j) {
        const uint32_t at = to + half * kHalf + j * kColumnBlockBytes;
        if constexpr (Config::kTwoHalves) {
          load(at, column + j * 64, k, half, expert);
        } else {
          load(at, column + half * kColumns / 2 + j * 64, k, expert);
        }
      }
    } else {
      // An odd number of blocks: a half is 32 of the 64 values of k of each.
#pragma unroll
      for (int j = 0; j < kColumns / 64; ++j) {
        load(to + j * kColumnBlockBytes + half * kColumnBlockBytes / 2, column + j * 64,
             k + half * 32, expert);
      }
    }
  }

  __device__ __forceinline__ void produce() const {
    give_registers<Config::kProducerRegisters>();
    if (!kGather && threadIdx.x != 0) return;
    // Gathering thread: chunk `chunk` (16 bytes) of rows first_row + 16 i.
    constexpr int kRowsPerThread = kGather ? kRowTile / 16 : 1;
    const int chunk = threadIdx.x & 7, first_row = static_cast<int>(threadIdx.x) >> 3;
    const uint32_t pitch = args.k * sizeof(T);
    Ring<kStages> ring;
    for (int t = with_work(block); t < total; t = with_work(t + grid)) {
      const Spot spot = locate(t);
      const int needed = args.whole_tiles ? kRowTile : (spot.rows + 63) & ~63;
      int row[kRowsPerThread];
      if constexpr (kGather) {
        // Rows past the tile repeat a live one; what is computed from them is dropped.
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
          row[i] = args.source.token(spot.row + min(first_row + 16 * i, spot.rows - 1));
        }
      }
      for (int kb = 0; kb < args.k_blocks; ++kb) {
        barrier_wait(empty(ring.stage), ring.parity ^ 1, Waiting::kForEmptyStage, ring.stage);
        if (threadIdx.x == 0) {
          barrier_arrive_expect(full(ring.stage), kGather ? Plan::kB : Plan::kA + Plan::kB);
          load_w(ring.stage, spot, kb);
          if constexpr (!kGather) {
            tensor_load(first_tile(ring.stage), &maps.a, full(ring.stage), kb * kDepth, spot.row);
          }
        }
        if constexpr (kGather) {
          const int k = kb * kDepth + chunk * 8;
          const bool past_end = k >= args.k;
          const char* from = reinterpret_cast<const char*>(static_cast<const T*>(args.a) + k);
          const uint32_t to = first_tile(ring.stage) + operand_chunk(first_row, chunk);
#pragma unroll
          for (int i = 0; i < kRowsPerThread; ++i) {
            if (first_row + 16 * i < needed) {
              copy_async(to + i * 16 * 128, from + static_cast<uint64_t>(uint32_t(row[i])) * pitch,
                         past_end);
            }
          }
          copy_async_arrive(full(ring.stage));
        }
        ring.next();
      }
    }
    if constexpr (kGather) copy_async_wait_all();
  }

  // What the consumers do.

  // All products of a tile's first kLive blocks of 64 rows from row `first` of the tile on.
  template <int kLive>
  __device__ __forceinline__ void multiply(float (&sum)[Tile::kBlocks][Tile::kColumns / 2],
                                           int consumer, int first, Ring<kStages>& ring,
                                           uint32_t peer_barriers) const {
    int previous = -1;
    for (int kb = 0; kb < args.k_blocks; ++kb) {
      barrier_wait(full(ring.stage), ring.parity, Waiting::kForFullStage, ring.stage);
      if constexpr (kLive > 0) {
        if constexpr (kGather) fence_shared();  // gathered values were written by ordinary copies
#pragma unroll
        for (int m = 0; m < kLive; ++m) hold(sum[m]);
        product_fence();
#pragma unroll
        for (int kk = 0; kk < kDepth / 16; ++kk) {
          const uint64_t w =
              Config::kAcross ? operand(second_tile(ring.stage) + kk * 16 * 128, kColumnBlockBytes)
                              : operand(second_tile(ring.stage) + kk * 32, 16);
#pragma unroll
          for (int m = 0; m < kLive; ++m) {
            const uint32_t a = first_tile(ring.stage) + (first + m * 64) * 128 + kk * 32;
            product<T, 0, Config::kAcross>(sum[m], operand(a, 16), w, kk > 0 ? 1 : kb);
          }
        }
        product_commit();
#pragma unroll
        for (int m = 0; m < kLive; ++m) hold(sum[m]);
        product_wait<1>();  // the stage before this one has been read
      }
      if (previous >= 0) release(previous, peer_barriers);
      previous = ring.stage;
      ring.next();
    }
    if constexpr (kPingpong) {
      if (threadIdx.x % kWarpSize == 0) barrier_arrive(turn(consumer ^ 1));
    }
    if constexpr (kLive > 0) {
      product_wait<0>();
#pragma unroll
      for (int m = 0; m < kLive; ++m) hold(sum[m]);
    }
    release(previous, peer_barriers);
  }

  __device__ __forceinline__ void consume(int consumer) const {
    take_registers<Config::kConsumerRegisters>();
    constexpr int kBlocks = Tile::kBlocks;
    const int first = kPingpong ? 0 : consumer * 64 * kBlocks;
    const uint32_t peer_barriers = Cta::peer_barriers();
    Writer<T, Config::kEpilogue, Config::kActivation, Tile::kColumns, kPingpong> writer(
        args.epilogue, base + Plan::kOffsetEpilogue + consumer * Out::kBytes, pre_full(consumer),
        consumer, args.n, args.n_tiles);
    Ring<kStages> ring;
    int turn_parity = consumer ^ 1;  // the first turn of the first consumer is free
    int t = with_work(block);
    if (kPingpong && consumer == 1) {
      ring.skip(args.k_blocks);
      t = with_work(t + grid);
    }
    while (t < total) {
      const Spot spot = locate(t);
      const int rows = spot.rows - first;  // may be below 1 for the second half of a tile
      const int live = args.whole_tiles ? kBlocks : min(max((rows + 63) / 64, 0), kBlocks);
      const OutputSpot out{spot.expert, spot.row + first, rows, live, spot.n};
      float sum[kBlocks][Tile::kColumns / 2];
      if constexpr (Out::kPasses > 1) clear(sum);
      writer.begin_tile(out, maps.pre);
      if constexpr (kPingpong) {
        barrier_wait(turn(consumer), turn_parity, Waiting::kForTurn, consumer);
        turn_parity ^= 1;
      }
      if (live == kBlocks) {
        multiply<kBlocks>(sum, consumer, first, ring, peer_barriers);
      } else {
        multiply<kBlocks - 1>(sum, consumer, first, ring, peer_barriers);
      }
      if constexpr (kPingpong) ring.skip(args.k_blocks);  // the other consumer's tile
      writer.write_tile(sum, out, maps.out, maps.hidden, maps.pre);
      t = with_work(t + grid);
      if constexpr (kPingpong) t = with_work(t + grid);
    }
    if (threadIdx.x % kWarpgroup == 0) store_wait_all();
  }
};

template <class Config>
__global__ void __launch_bounds__(3 * kWarpgroup, 1)
    rows_gemm_kernel(const __grid_constant__ RowsArgs args, const __grid_constant__ RowsMaps maps) {
  extern __shared__ uint8_t memory[];
  RowsGemm<Config> gemm(args, maps,
                        (shared_address(memory) + kAlignBytes - 1) & ~(kAlignBytes - 1u));
  if (threadIdx.x == 0) gemm.init_barriers();
  if constexpr (Config::Tile::kCluster == 2) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  gemm.read_table();
  // A shuffle tells the compiler that the role is the same in all lanes of a warp.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0);
  if (warpgroup == 0) {
    gemm.produce();
  } else {
    gemm.consume(warpgroup - 1);
  }
  // Nobody leaves while the peer may still arrive at its barriers or write into its stages.
  if constexpr (Config::Tile::kCluster == 2) cluster_barrier();
}

}  // namespace moeops::hopper
