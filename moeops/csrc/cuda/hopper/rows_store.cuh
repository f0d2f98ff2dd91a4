#pragma once

#include "hopper/launch_rows.cuh"

namespace moeops::cuda::hopper {

// Stores sums whatever the activation is called.
constexpr Activation kNoActivation = Activation::kSilu;

template <typename T>
void launch_store(const RowsLaunch& problem, const RowsChoice& choice) {
  auto* launch = problem.weight.across()
                     ? &launch_chosen<T, Epilogue::kStore, kNoActivation, false, true, Pingpong192,
                                      Pingpong192Pair, Cooperative256, Cooperative256Pair>
                     : &launch_chosen<T, Epilogue::kStore, kNoActivation, false, false, Pingpong192,
                                      Pingpong192Pair, Cooperative256, Cooperative256Pair>;
  launch(problem, choice);
}

}  // namespace moeops::cuda::hopper
