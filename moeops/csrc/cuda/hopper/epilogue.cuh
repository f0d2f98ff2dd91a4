// What becomes of the sums of a tile of rows: stored, or put through the activation or its
// backward.
//
// A consumer warpgroup writes blocks of 64 rows in chunks of 32 columns through small buffers in
// shared memory. In a gated activation gate and up of a hidden value sit in the same thread:
// columns c of two halves of a row, or neighbouring columns where both are in turns.
#pragma once

#include "hopper/common.cuh"
#include "kernels/activation.cuh"

namespace moeops::hopper {

enum class Epilogue {
  kStore,               // out = sum + bias
  kActivation,          // out = pre = sum + bias, rounded; hidden = act(pre)
  kActivationBackward,  // sum is the gradient of hidden; out = grad_pre, hidden = weighted hidden
};

constexpr int kPreSlots = 3;       // chunks of the pre-activation in flight
constexpr int kHiddenBuffers = 2;  // of the backward

// Pointers may be null where an output or a bias is not wanted.
struct EpilogueArgs {
  void* out;                  // [R, n], [R, parts * n] for activations
  void* hidden;               // [R, n]
  const void* bias;           // [E, n] or [E, parts * n]
  const float* topk_weights;  // of the backward: weight of each pair
  RowSource source;           // of the backward: the pair of each row
  float* partial;             // of the backward: <sum, act(pre)> of each row and tile, [R, n_tiles]
  GluConstants<float> unit;   // of activations with options
};

// A consumer's blocks of a tile: `live` blocks of 64 rows, `rows` rows from `row` on, tile n.
struct OutputSpot {
  int expert, row, rows, live, n;
};

template <Epilogue kEpilogue, Activation kActivation, int kTileColumns, bool kPingpong>
struct EpilogueShape {
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr bool kInTurns = kActivation == Activation::kGluInTurns;
  // Columns of out for each of hidden, and buffers for them: gate and up, or one.
  static constexpr int kParts = kEpilogue != Epilogue::kStore && kGated ? 2 : 1;
  // Columns of hidden, or of out, that a tile makes.
  static constexpr int kColumns =
      kEpilogue == Epilogue::kActivation && kGated ? kTileColumns / 2 : kTileColumns;
  // Chunks under way at a time. A cooperative tile needs the memory for a fourth stage.
  static constexpr int kChunks = kEpilogue == Epilogue::kActivation && !kPingpong ? 1 : 2;
  static constexpr int kBuffers = kEpilogue == Epilogue::kActivation ? kParts + 1 : 1;
  // Passes of a loop over the chunks of a block of rows. Unrolled, the arithmetic of GELU made 8200
  // to 9400 instructions, more than the 128 KB that an instruction cache seems to hold: the up
  // product took 1.2 times as long as in two passes, its backward 1.6 times.
  static constexpr bool kLong =
      !kGated || (kEpilogue == Epilogue::kActivationBackward && has_options(kActivation));
  static constexpr int kPasses = kEpilogue != Epilogue::kStore && kLong ? 2 : 1;
  static constexpr int kBytes = kEpilogue == Epilogue::kActivationBackward
                                    ? (kPreSlots * kParts + kHiddenBuffers) * kOutputChunkBytes
                                    : kChunks * kBuffers * kOutputChunkBytes;
};

// Words of four accumulator pairs: rows r and r + 8 of one block of 8 columns, then of the next.
struct Quad {
  uint32_t word[4];
};

template <typename T, Epilogue kEpilogue, Activation kActivation, int kTileColumns, bool kPingpong>
struct Writer {
  using Shape = EpilogueShape<kEpilogue, kActivation, kTileColumns, kPingpong>;
  static constexpr int kBlocks = kPingpong ? 2 : 1, kParts = Shape::kParts;
  static constexpr int kAcross = Shape::kColumns / 32;  // chunks of a block of rows
  static constexpr int kSlotBytes = kParts * kOutputChunkBytes;
  // Of a thread, in a chunk; in turns, gate and up follow each other.
  static constexpr int kChunkSums = kEpilogue == Epilogue::kActivation && Shape::kInTurns ? 32 : 16;

  // Of the backward: routing weights of this thread's rows r and r + 8, and their gradients.
  struct RowPair {
    float weight[2], dot[2];
  };

  const EpilogueArgs& args;
  const uint32_t buffers, pre_full;
  const int consumer, n, n_tiles;
  const int thread, lane, warp;
  int slot = 0, pre_parity = 0, hidden_buffer = 0;  // of the backward

  __device__ __forceinline__ Writer(const EpilogueArgs& args, uint32_t buffers, uint32_t pre_full,
                                    int consumer, int n, int n_tiles)
      : args(args),
        buffers(buffers),
        pre_full(pre_full),
        consumer(consumer),
        n(n),
        n_tiles(n_tiles),
        thread(threadIdx.x % kWarpgroup),
        lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x % kWarpgroup / kWarpSize) {}

  __device__ __forceinline__ void warpgroup_barrier() const {
    named_barrier(1 + consumer, kWarpgroup);
  }

  // The pre-activation of the backward, loaded ahead in a ring of slots.

  // Chunk i of the tile: rows 64 (i / kAcross), columns 32 (i % kAcross).
  __device__ __forceinline__ void load_pre(const CUtensorMap& map, const OutputSpot& spot, int i,
                                           int to) const {
    const uint32_t barrier = pre_full + 8 * to;
    barrier_arrive_expect(barrier, kSlotBytes);
    const int column = spot.n * Shape::kColumns + i % kAcross * 32,
              row = spot.row + i / kAcross * 64;
    const uint32_t at = buffers + to * kSlotBytes;
    if constexpr (Shape::kInTurns) {
      tensor_load(at, &map, barrier, 2 * column, row, 0);
      tensor_load(at + kOutputChunkBytes, &map, barrier, 2 * column + 32, row, 0);
    } else {
      tensor_load(at, &map, barrier, column, row, 0);
    }
  }

  __device__ __forceinline__ void begin_tile(const OutputSpot& spot, const CUtensorMap& pre) {
    if constexpr (kEpilogue == Epilogue::kActivationBackward) {
      fence_shared();
      warpgroup_barrier();  // nobody still reads the last tile's buffers
      if (thread == 0) {
        store_wait_read<0>();
        const int chunks = min(kPreSlots, spot.live * kAcross);
        for (int i = 0, to = slot; i < chunks; ++i, to = to + 1 == kPreSlots ? 0 : to + 1) {
          load_pre(pre, spot, i, to);
        }
      }
      __syncwarp();
    }
  }

  // All kinds.

  __device__ __forceinline__ void write_tile(const float (&sum)[kBlocks][kTileColumns / 2],
                                             const OutputSpot& spot, const CUtensorMap& out,
                                             const CUtensorMap& hidden, const CUtensorMap& pre) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      if (m >= spot.live) continue;
      RowPair rows{};
      if constexpr (kEpilogue == Epilogue::kActivationBackward) rows = begin_rows(spot, m);
      if constexpr (Shape::kPasses == 1) {
        write_chunks<kAcross>(sum[m], spot, m, 0, rows, out, hidden, pre);
      } else {
        write_in_passes(sum[m], spot, m, rows, out, hidden, pre);
      }
      if constexpr (kEpilogue == Epilogue::kActivationBackward) end_rows(rows, spot, m);
    }
  }

  // In a loop. Sums have fixed registers, so that they move to where the first pass found its own.
  __device__ __forceinline__ void write_in_passes(const float (&sum)[kTileColumns / 2],
                                                  const OutputSpot& spot, int m, RowPair& rows,
                                                  const CUtensorMap& out, const CUtensorMap& hidden,
                                                  const CUtensorMap& pre) {
    static_assert(!Shape::kGated || kEpilogue == Epilogue::kActivationBackward,
                  "gate and up are two runs of sums, or of twice the length");
    static_assert(kAcross % Shape::kPasses == 0, "passes are of equal length");
    constexpr int kStep = kAcross / Shape::kPasses, kTaken = kStep * kChunkSums;
    float left[kTileColumns / 2];
#pragma unroll
    for (int i = 0; i < kTileColumns / 2; ++i) left[i] = moved(sum[i]);
#pragma unroll 1
    for (int first = 0; first < kAcross; first += kStep) {
      write_chunks<kStep>(left, spot, m, first, rows, out, hidden, pre);
#pragma unroll
      for (int i = 0; i + kTaken < kTileColumns / 2; ++i) left[i] = left[i + kTaken];
    }
  }

  // kCount chunks from chunk `first` on, whose sums come first in `sum`.
  template <int kCount>
  __device__ __forceinline__ void write_chunks(const float (&sum)[kTileColumns / 2],
                                               const OutputSpot& spot, int m, int first,
                                               RowPair& rows, const CUtensorMap& out,
                                               const CUtensorMap& hidden, const CUtensorMap& pre) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kEpilogue == Epilogue::kActivationBackward) {
        backward_chunk(sum + i * kChunkSums, spot, m, first + i, rows, out, hidden, pre);
      } else {
        forward_chunk(sum + i * kChunkSums, spot, m, first + i, out, hidden);
      }
    }
  }

  __device__ __forceinline__ void stage(uint32_t buffer, uint32_t at, const Quad& quad) const {
    store_matrices(buffer + at, quad.word[0], quad.word[1], quad.word[2], quad.word[3]);
  }

  // sum + bias, rounded: 8 sums from column `column` of the `width` of part `part` on. The sums
  // themselves must stay as the products left them, or ptxas serialises the products.
  __device__ __forceinline__ Quad with_bias(const float* sum, int expert, int part, int column,
                                            int width) const {
    float2 bias[2] = {};
    if (args.bias != nullptr) {
      const T* own = static_cast<const T*>(args.bias) + static_cast<int64_t>(expert) * kParts * n +
                     part * width + column + lane % 4 * 2;
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        if (column + block * 8 >= width) continue;
        bias[block] = unpack<T>(*reinterpret_cast<const uint32_t*>(own + block * 8));
      }
    }
    Quad out;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      out.word[q] = pack<T>(sum[2 * q] + bias[q >> 1].x, sum[2 * q + 1] + bias[q >> 1].y);
    }
    return out;
  }

  // act(pre) of rounded values, so that the backward sees the same.
  __device__ __forceinline__ Quad activated(const Quad& gate, const Quad& up) const {
    Quad out;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float2 z = unpack<T>(gate.word[q]), u = unpack<T>(up.word[q]);
      out.word[q] = pack<T>(activate<T, kActivation>(args.unit, z.x, u.x).value,
                            activate<T, kActivation>(args.unit, z.y, u.y).value);
    }
    return out;
  }

  // The same where each word holds gate and up: columns 8 j to 8 j + 15 of a chunk of 64 make 4 j
  // to 4 j + 7 of hidden. Neighbouring lanes have neighbouring values of rows r and r + 8 and swap
  // one, so that each stores two of one row.
  __device__ __forceinline__ void stage_activated_in_turns(uint32_t buffer, int j,
                                                           const Quad& pre) const {
    float value[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float2 pair = unpack<T>(pre.word[q]);
      value[q] = activate<T, kActivation>(args.unit, pair.x, pair.y).value;
    }
    const bool odd = lane & 1;
    const uint32_t sent = odd ? pack<T>(value[0], value[2]) : pack<T>(value[1], value[3]);
    const uint32_t kept = odd ? pack<T>(value[1], value[3]) : pack<T>(value[0], value[2]);
    const uint32_t got = __shfl_xor_sync(kFullMask, sent, 1);
    const uint32_t left = odd ? got : kept, right = odd ? kept : got;
    const int row = warp * 16 + lane / 4 + (odd ? 8 : 0);
    const uint32_t to = buffer + output_chunk(row, j / 2) + (lane & 2) * 2;
    store_shared_4(to, __byte_perm(left, right, 0x5410));
    store_shared_4(to + 8, __byte_perm(left, right, 0x7632));
  }

  __device__ __forceinline__ void forward_chunk(const float* sum, const OutputSpot& spot, int m,
                                                int chunk, const CUtensorMap& out,
                                                const CUtensorMap& hidden) {
    constexpr int kChunks = Shape::kChunks;
    const int column = spot.n * Shape::kColumns + chunk * 32;
    const uint32_t buffer =
        buffers + (m * kAcross + chunk) % kChunks * Shape::kBuffers * kOutputChunkBytes;
    if (thread == 0) {
      if (m == 0 && chunk == 0) {
        store_wait_read<0>();
      } else {
        store_wait_read<kChunks - 1>();
      }
    }
    warpgroup_barrier();  // the buffer is free
    if constexpr (kEpilogue == Epilogue::kActivation && Shape::kInTurns) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const Quad both = with_bias(sum + j * 4, spot.expert, 0, 2 * column + j * 8, 2 * n);
        stage(buffer + j / 4 * kOutputChunkBytes, output_lane(warp, lane, j % 4), both);
        stage_activated_in_turns(buffer + kParts * kOutputChunkBytes, j, both);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float* own = sum + j * 4;
        const uint32_t at = output_lane(warp, lane, j);
        const Quad first = with_bias(own, spot.expert, 0, column + j * 8, n);
        stage(buffer, at, first);
        if constexpr (kEpilogue == Epilogue::kActivation) {
          Quad second{};
          if constexpr (kParts == 2) {
            second = with_bias(own + kTileColumns / 4, spot.expert, 1, column + j * 8, n);
            stage(buffer + kOutputChunkBytes, at, second);
          }
          stage(buffer + kParts * kOutputChunkBytes, at, activated(first, second));
        }
      }
    }
    fence_shared();
    warpgroup_barrier();
    send(buffer, buffer + kParts * kOutputChunkBytes, spot, m, column, out, hidden);
    if (thread == 0) store_commit();  // also an empty group: store_wait_read counts groups
  }

  // A chunk from its buffers to global memory.
  __device__ __forceinline__ void send(uint32_t out_buffer, uint32_t hidden_buffer,
                                       const OutputSpot& spot, int m, int column,
                                       const CUtensorMap& out, const CUtensorMap& hidden) const {
    constexpr bool kHidden = kEpilogue != Epilogue::kStore;
    const int row = spot.row + m * 64, rows = spot.rows - m * 64;
    if (rows >= 64) {
      if (thread == 0) {
        if (args.out != nullptr) {
          // The backward moves gate and up as one box, the forward made them one by one.
          if constexpr (kParts == 2 && Shape::kInTurns) {
            tensor_store(&out, out_buffer, 2 * column, row, 0);
            tensor_store(&out, out_buffer + kOutputChunkBytes, 2 * column + 32, row, 0);
          } else {
            tensor_store(&out, out_buffer, column, row, 0);
            if constexpr (kEpilogue == Epilogue::kActivation && kParts == 2) {
              tensor_store(&out, out_buffer + kOutputChunkBytes, column, row, 1);
            }
          }
        }
        if (kHidden && args.hidden != nullptr) tensor_store(&hidden, hidden_buffer, column, row, 0);
      }
      return;
    }
#pragma unroll 1
    for (int i = thread; i < 64 * 4; i += kWarpgroup) {
      const int r = i >> 2, c = column + (i & 3) * 8;
      if (r >= rows || (!Shape::kInTurns && c >= n)) continue;
      const uint32_t at = output_chunk(r, i & 3);
      if (args.out != nullptr) {
        T* to = static_cast<T*>(args.out) + static_cast<int64_t>(row + r) * kParts * n + c;
        if constexpr (kParts == 2 && Shape::kInTurns) {
          send_in_turns(to - c, out_buffer + at, column + c);
        } else {
          *reinterpret_cast<uint4*>(to) = load_shared_16(out_buffer + at);
          if constexpr (kParts == 2) {
            *reinterpret_cast<uint4*>(to + n) = load_shared_16(out_buffer + kOutputChunkBytes + at);
          }
        }
      }
      if (Shape::kInTurns && c >= n) continue;
      if (kHidden && args.hidden != nullptr) {
        T* to = static_cast<T*>(args.hidden) + static_cast<int64_t>(row + r) * n + c;
        *reinterpret_cast<uint4*>(to) = load_shared_16(hidden_buffer + at);
      }
    }
  }

  // 8 values from column c on of a row of 2 n, and 8 from 32 columns further on.
  __device__ __forceinline__ void send_in_turns(T* row, uint32_t from, int c) const {
    if (c < 2 * n) *reinterpret_cast<uint4*>(row + c) = load_shared_16(from);
    if (c + 32 < 2 * n) {
      *reinterpret_cast<uint4*>(row + c + 32) = load_shared_16(from + kOutputChunkBytes);
    }
  }

  // Backward: the gradients of gate and up overwrite them in their slot.

  // Gate and up of hidden columns 8 j to 8 j + 15 of a chunk, which lie in turns in its two
  // buffers, in the places that load_matrices gives halves of a row; and back.
  __device__ __forceinline__ uint32_t place_in_turns(uint32_t buffer, int j, int q) const {
    const int row = warp * 16 + lane / 4 + (q & 1) * 8, chunk = 2 * (q >> 1) + (lane >> 1 & 1);
    return buffer + j / 2 * kOutputChunkBytes + output_chunk(row, chunk) + (lane & 1) * 8;
  }
  __device__ __forceinline__ void load_in_turns(uint32_t buffer, int j, Quad& gate,
                                                Quad& up) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint2 pairs = load_shared_8(place_in_turns(buffer, j, q));
      gate.word[q] = __byte_perm(pairs.x, pairs.y, 0x5410);
      up.word[q] = __byte_perm(pairs.x, pairs.y, 0x7632);
    }
  }
  __device__ __forceinline__ void stage_in_turns(uint32_t buffer, int j, const Quad& gate,
                                                 const Quad& up) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      store_shared_8(place_in_turns(buffer, j, q), {__byte_perm(gate.word[q], up.word[q], 0x5410),
                                                    __byte_perm(gate.word[q], up.word[q], 0x7632)});
    }
  }

  __device__ __forceinline__ RowPair begin_rows(const OutputSpot& spot, int m) const {
    RowPair rows{};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = m * 64 + warp * 16 + lane / 4 + 8 * i;
      if (r < spot.rows) rows.weight[i] = args.topk_weights[args.source.pair(spot.row + r)];
    }
    return rows;
  }

  __device__ __forceinline__ void end_rows(const RowPair& rows, const OutputSpot& spot,
                                           int m) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float dot = rows.dot[i];  // over the four lanes that share the row
      dot += __shfl_xor_sync(kFullMask, dot, 1);
      dot += __shfl_xor_sync(kFullMask, dot, 2);
      const int r = m * 64 + warp * 16 + lane / 4 + 8 * i;
      if (args.partial != nullptr && lane % 4 == 0 && r < spot.rows && spot.n < n_tiles) {
        args.partial[static_cast<int64_t>(spot.row + r) * n_tiles + spot.n] = dot;
      }
    }
  }

  __device__ __forceinline__ void backward_chunk(const float* sum, const OutputSpot& spot, int m,
                                                 int chunk, RowPair& rows, const CUtensorMap& out,
                                                 const CUtensorMap& hidden,
                                                 const CUtensorMap& pre) {
    const int i = m * kAcross + chunk;
    barrier_wait(pre_full + 8 * slot, pre_parity, Waiting::kForPreActivation, slot);
    warpgroup_barrier();  // the hidden buffer is free: thread 0 waited for its store below
    const uint32_t buffer = buffers + slot * kSlotBytes;
    const uint32_t weighted = buffers + kPreSlots * kSlotBytes + hidden_buffer * kOutputChunkBytes;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t at = output_lane(warp, lane, j);
      Quad gate, up{}, value;
      if constexpr (Shape::kInTurns) {
        load_in_turns(buffer, j, gate, up);
        differentiate(sum + j * 4, gate, up, value, rows);
        stage_in_turns(buffer, j, gate, up);
      } else {
        load_matrices(buffer + at, gate.word);
        if constexpr (kParts == 2) load_matrices(buffer + kOutputChunkBytes + at, up.word);
        differentiate(sum + j * 4, gate, up, value, rows);
        stage(buffer, at, gate);
        if constexpr (kParts == 2) stage(buffer + kOutputChunkBytes, at, up);
      }
      stage(weighted, at, value);
    }
    fence_shared();
    warpgroup_barrier();
    send(buffer, weighted, spot, m, spot.n * Shape::kColumns + chunk * 32, out, hidden);
    if (thread == 0) {
      store_commit();
      store_wait_read<1>();  // the chunk before this one has left: its slot takes the next load
      if (i > 0 && i + kPreSlots - 1 < spot.live * kAcross) {
        load_pre(pre, spot, i + kPreSlots - 1, slot == 0 ? kPreSlots - 1 : slot - 1);
      }
    }
    __syncwarp();
    if (++slot == kPreSlots) {
      slot = 0;
      pre_parity ^= 1;
    }
    hidden_buffer ^= 1;
  }

  // In: the gradient of hidden, gate and up. Out: their gradients, and the weighted hidden value.
  __device__ __forceinline__ void differentiate(const float* grad, Quad& gate, Quad& up,
                                                Quad& value, RowPair& rows) const {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float weight = rows.weight[q & 1];
      const float2 z = unpack<T>(gate.word[q]), u = unpack<T>(up.word[q]);
      float grad_gate[2], grad_up[2], weighted[2];
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const float g = grad[2 * q + x];
        const Hidden<float> h =
            activate<T, kActivation>(args.unit, x == 0 ? z.x : z.y, x == 0 ? u.x : u.y);
        if constexpr (Shape::kGated) grad_up[x] = weight * g * h.by_up;
        rows.dot[q & 1] += g * h.value;
        weighted[x] = weight * h.value;
        grad_gate[x] = weight * g * h.by_gate;
      }
      gate.word[q] = pack<T>(grad_gate[0], grad_gate[1]);
      if constexpr (Shape::kGated) up.word[q] = pack<T>(grad_up[0], grad_up[1]);
      value.word[q] = pack<T>(weighted[0], weighted[1]);
    }
  }
};

}  // namespace moeops::hopper
