// From a problem over ragged rows to tensor maps and a launch.
#pragma once

#include "hopper/hopper.h"
#include "hopper/rows_gemm.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tiles.h"

namespace moeops::cuda::hopper {

using moeops::hopper::Epilogue;
using moeops::hopper::EpilogueArgs;

template <int kColumns, bool kPingpong, int kCluster, RowsTileKind kKind_>
struct NamedRowsTile : moeops::hopper::RowsTile<kColumns, kPingpong, kCluster> {
  static constexpr RowsTileKind kKind = kKind_;
};
using Pingpong192 = NamedRowsTile<192, true, 1, RowsTileKind::kPingpong192>;
using Pingpong192Pair = NamedRowsTile<192, true, 2, RowsTileKind::kPingpong192Pair>;
using Pingpong128 = NamedRowsTile<128, true, 1, RowsTileKind::kPingpong128>;
using Cooperative256 = NamedRowsTile<256, false, 1, RowsTileKind::kCooperative256>;
using Cooperative256Pair = NamedRowsTile<256, false, 2, RowsTileKind::kCooperative256Pair>;

// W [E, N, K] in any layout that a tensor map can describe; strides in elements.
struct WeightView {
  const void* data;
  int64_t num_experts, n, k, expert_stride, n_stride, k_stride;

  explicit WeightView(const Tensor& weight)
      : data(weight.data_ptr()),
        num_experts(weight.size(0)),
        n(weight.size(1)),
        k(weight.size(2)),
        // The stride of a single expert is never used, and may be anything.
        expert_stride(weight.size(0) == 1 ? weight.size(1) * weight.size(2) : weight.stride(0)),
        n_stride(weight.stride(1)),
        k_stride(weight.stride(2)) {}

  bool across() const { return k_stride != 1; }
};

struct RowsLaunch {
  const char* product;
  ScalarType type;
  const void* a;
  int64_t a_rows, num_rows;
  const Gather* gather;  // null where A lies in expert order
  WeightView weight;
  int64_t n;  // columns of hidden, or of out
  EpilogueArgs epilogue;
  const void* pre;
  const RowPlan& plan;
  int device;
  cudaStream_t stream;
};

inline moeops::hopper::RowSource row_source(const Gather* gather) {
  using moeops::hopper::Divider;
  if (gather == nullptr) return {nullptr, Divider(1), 0};
  return {static_cast<const int32_t*>(gather->row_to_pair.data_ptr()),
          Divider(static_cast<int>(gather->top_k)), static_cast<int>(gather->num_pairs)};
}

template <class Config>
CUtensorMap weight_map(const RowsLaunch& problem) {
  using Out = typename Config::Out;
  constexpr uint32_t kCluster = Config::Tile::kCluster, kColumns = Config::Tile::kColumns;
  constexpr int64_t kBytes = 2;
  const WeightView& w = problem.weight;
  const auto n = static_cast<uint64_t>(Config::kTwoHalves ? problem.n : w.n);
  const auto k = static_cast<uint64_t>(w.k);
  const auto experts = static_cast<uint64_t>(w.num_experts);
  const auto bytes = [](int64_t elements) { return static_cast<uint64_t>(elements * kBytes); };
  MapSpec spec{problem.product, w.data, 3, {}, {}, {}, 128};
  if constexpr (Config::kTwoHalves) {
    // Gate and up as a dimension of their own: each half ends, and is zero-filled, by itself.
    spec.rank = 4;
    if constexpr (Config::kAcross) {
      spec.sizes = {n, k, 2, experts};
      spec.strides = {bytes(w.k_stride), bytes(problem.n * w.n_stride), bytes(w.expert_stride)};
      spec.box = {64, 64, 1, 1};
    } else {
      spec.sizes = {k, n, 2, experts};
      spec.strides = {bytes(w.n_stride), bytes(problem.n * w.n_stride), bytes(w.expert_stride)};
      spec.box = {64, Out::kColumns, kCluster == 2 ? 1u : 2u, 1};
    }
  } else if constexpr (Config::kAcross) {
    spec.sizes = {n, k, experts};
    spec.strides = {bytes(w.k_stride), bytes(w.expert_stride)};
    spec.box = {64, kCluster == 2 && kColumns % 128 != 0 ? 32u : 64u, 1};
  } else {
    spec.sizes = {k, n, experts};
    spec.strides = {bytes(w.n_stride), bytes(w.expert_stride)};
    spec.box = {64, kColumns / kCluster, 1};
  }
  return encode(spec, problem.type);
}

// Rows of `parts` pieces of `width` values, in boxes of 64 rows x 32 columns x `box_parts`.
inline CUtensorMap output_map(const char* name, const void* data, const RowsLaunch& problem,
                              int64_t width, int parts, int box_parts) {
  const auto n = static_cast<uint64_t>(width), rows = static_cast<uint64_t>(problem.num_rows);
  const auto pieces = static_cast<uint64_t>(parts);
  return encode({name,
                 data,
                 3,
                 {n, rows, pieces},
                 {2 * n * pieces, 2 * n},
                 {32, 64, static_cast<uint32_t>(box_parts)},
                 64},
                problem.type);
}

template <class Config>
void launch_rows(const RowsLaunch& problem, const RowsChoice& choice) {
  using Out = typename Config::Out;
  using moeops::hopper::kDepth;
  using moeops::hopper::kRowTile;
  using moeops::hopper::RowsArgs;
  const int64_t k = problem.weight.k;
  moeops::hopper::RowsMaps maps{};
  if constexpr (!Config::kGather) {
    maps.a = encode({problem.product,
                     problem.a,
                     2,
                     {static_cast<uint64_t>(k), static_cast<uint64_t>(problem.a_rows)},
                     {static_cast<uint64_t>(2 * k)},
                     {kDepth, kRowTile},
                     128},
                    problem.type);
  }
  maps.w = weight_map<Config>(problem);
  const EpilogueArgs& epilogue = problem.epilogue;
  // Gate and up in turns are one piece of twice the width, which two boxes of 32 columns cover.
  constexpr int kPieces = Out::kInTurns ? 1 : Out::kParts;
  constexpr int kBoxParts = Config::kBackward ? kPieces : 1;
  const int64_t width = problem.n * Out::kParts / kPieces;
  if (epilogue.out != nullptr) {
    maps.out = output_map(problem.product, epilogue.out, problem, width, kPieces, kBoxParts);
  }
  if (epilogue.hidden != nullptr) {
    maps.hidden = output_map(problem.product, epilogue.hidden, problem, problem.n, 1, 1);
  }
  if constexpr (Config::kBackward) {
    maps.pre = output_map(problem.product, problem.pre, problem, width, kPieces, kBoxParts);
  }
  const RowsArgs args{problem.a,
                      row_source(problem.gather),
                      problem.plan.tile_table(),
                      problem.plan.num_tiles(),
                      epilogue,
                      choice.large_groups ? 1 : 0,
                      static_cast<int>(k),
                      static_cast<int>(problem.n),
                      static_cast<int>(ceil_div(problem.n, Out::kColumns)),
                      static_cast<int>(ceil_div(k, kDepth)),
                      choice.whole_tiles};
  moeops::hopper::launch_persistent<&moeops::hopper::rows_gemm_kernel<Config>,
                                    Config::Tile::kCluster, Config::Plan::kBytes>(
      problem.device, 3 * moeops::hopper::kWarpgroup, problem.stream, args, maps);
}

// Launches the one of Tiles that was chosen.
template <typename T, Epilogue kEpilogue, Activation kActivation, bool kGather, bool kAcross,
          class... Tiles>
void launch_chosen(const RowsLaunch& problem, const RowsChoice& choice) {
  const bool found =
      ((Tiles::kKind == choice.tile
            ? (launch_rows<
                   moeops::hopper::RowsConfig<T, Tiles, kEpilogue, kActivation, kGather, kAcross>>(
                   problem, choice),
               true)
            : false) ||
       ...);
  STD_TORCH_CHECK(found, "moeops: ", problem.product,
                  " must have a tile that this product is built for, got tile number ",
                  static_cast<int>(choice.tile), ". Correct MOEOPS_TILES, or unset it.");
}

// Columns of hidden that a tile makes in the backward of the down product.
inline int64_t backward_columns(RowsTileKind tile) {
  return tile == RowsTileKind::kPingpong128 ? 128 : 192;
}

// One for each type, each in a file of its own.
template <typename T>
void launch_store(const RowsLaunch& problem, const RowsChoice& choice);
template <typename T>
void launch_gated_up(const RowsLaunch& problem, const RowsChoice& choice);
template <typename T>
void launch_plain_up(const RowsLaunch& problem, Activation activation, const RowsChoice& choice);
template <typename T>
void launch_gated_backward(const RowsLaunch& problem, const RowsChoice& choice);
template <typename T>
void launch_plain_backward(const RowsLaunch& problem, Activation activation,
                           const RowsChoice& choice);
template <typename T>
void launch_glu_up(const RowsLaunch& problem, bool in_turns, const RowsChoice& choice);
template <typename T>
void launch_glu_backward(const RowsLaunch& problem, bool in_turns, const RowsChoice& choice);

}  // namespace moeops::cuda::hopper
