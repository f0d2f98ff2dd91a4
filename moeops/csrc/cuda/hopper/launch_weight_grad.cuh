// From a weight gradient to tensor maps and a launch.
#pragma once

#include "hopper/hopper.h"
#include "hopper/launch_rows.cuh"
#include "hopper/tensor_map.h"
#include "hopper/tiles.h"
#include "hopper/weight_grad_gemm.cuh"

namespace moeops::cuda::hopper {

using moeops::hopper::Gathered;
using moeops::hopper::WeightGradConfig;
using moeops::hopper::WeightGradTile;

struct WeightGradLaunch {
  const char* product;
  ScalarType type;
  const void *p, *q;
  int64_t p_rows, q_rows, num_experts, m, n;
  Operand gathered;
  const Gather* gather;
  const RowPlan& plan;
  void* out;
  int device;
  cudaStream_t stream;
};

template <typename T>
void launch_weight_grad(const WeightGradLaunch& problem, const WeightGradChoice& choice);

template <class Config>
void launch_weight_grad_tile(const WeightGradLaunch& problem, int group) {
  using Tile = typename Config::Tile;
  using moeops::hopper::kDepth;
  const auto m = static_cast<uint64_t>(problem.m), n = static_cast<uint64_t>(problem.n);
  moeops::hopper::WeightGradMaps maps{};
  const auto operand_map = [&](const void* data, uint64_t width, int64_t rows) {
    return encode({problem.product,
                   data,
                   2,
                   {width, static_cast<uint64_t>(rows)},
                   {2 * width},
                   {64, kDepth / Tile::kCluster},
                   128},
                  problem.type);
  };
  if constexpr (Config::kGathered != Gathered::kP) {
    maps.p = operand_map(problem.p, m, problem.p_rows);
  }
  if constexpr (Config::kGathered != Gathered::kQ) {
    maps.q = operand_map(problem.q, n, problem.q_rows);
  }
  maps.out = encode({problem.product,
                     problem.out,
                     3,
                     {n, m, static_cast<uint64_t>(problem.num_experts)},
                     {2 * n, 2 * n * m},
                     {32, 64, 1},
                     64},
                    problem.type);
  const moeops::hopper::WeightGradArgs args{
      problem.p,
      problem.q,
      row_source(problem.gather),
      static_cast<const int32_t*>(problem.plan.offsets.data_ptr()),
      static_cast<int>(problem.num_experts),
      static_cast<int>(problem.m),
      static_cast<int>(problem.n),
      static_cast<int>(ceil_div(problem.m, Tile::kRows)),
      static_cast<int>(ceil_div(problem.n, Tile::kColumns)),
      group};
  moeops::hopper::launch_persistent<&moeops::hopper::weight_grad_kernel<Config>, Tile::kCluster,
                                    Config::Plan::kBytes>(problem.device, Config::kThreads,
                                                          problem.stream, args, maps);
}

template <typename T, Gathered kGathered>
void launch_gathered(const WeightGradLaunch& problem, const WeightGradChoice& choice) {
  // Two warpgroups gather, except where the tile leaves them no registers.
  using Pingpong192 = WeightGradTile<192, true, 2, 1>;
  using Pingpong192Pair = WeightGradTile<192, true, 2, 2>;
  using Cooperative256 = WeightGradTile<256, false, 1, 1>;
  // The pairs along the other operand are numbered in a byte.
  const int64_t neighbours = kGathered == Gathered::kQ ? ceil_div(problem.n, Pingpong192::kColumns)
                                                       : ceil_div(problem.m, Pingpong192::kRows);
  if (choice.tile == WeightGradTileKind::kCooperative256) {
    return launch_weight_grad_tile<WeightGradConfig<T, Cooperative256, kGathered>>(problem,
                                                                                   choice.group);
  }
  if (choice.tile == WeightGradTileKind::kPingpong192Pair &&
      neighbours <= moeops::hopper::kMaxGroup) {
    return launch_weight_grad_tile<WeightGradConfig<T, Pingpong192Pair, kGathered>>(problem,
                                                                                    choice.group);
  }
  launch_weight_grad_tile<WeightGradConfig<T, Pingpong192, kGathered>>(problem, choice.group);
}

template <typename T>
void launch_weight_grad(const WeightGradLaunch& problem, const WeightGradChoice& choice) {
  switch (problem.gathered) {
    case Operand::kP:
      return launch_gathered<T, Gathered::kP>(problem, choice);
    case Operand::kQ:
      return launch_gathered<T, Gathered::kQ>(problem, choice);
    case Operand::kNone:
      return launch_weight_grad_tile<
          WeightGradConfig<T, WeightGradTile<192, true, 1, 1>, Gathered::kNone>>(problem,
                                                                                 choice.group);
  }
}

}  // namespace moeops::cuda::hopper
