#pragma once

#include "hopper/launch_rows.cuh"

namespace moeops::cuda::hopper {

template <typename T>
void launch_gated_up(const RowsLaunch& problem, const RowsChoice& choice) {
  constexpr auto kUp = Epilogue::kActivation;
  constexpr auto kGated = Activation::kSwiglu;
  auto* launch = problem.weight.across()
                     ? &launch_chosen<T, kUp, kGated, true, true, Cooperative256Pair>
                     : &launch_chosen<T, kUp, kGated, true, false, Pingpong192, Pingpong192Pair,
                                      Cooperative256, Cooperative256Pair>;
  launch(problem, choice);
}

template <typename T, Activation kActivation, class... Tiles>
void launch_backward(const RowsLaunch& problem, const RowsChoice& choice) {
  constexpr auto kBackward = Epilogue::kActivationBackward;
  auto* launch = problem.weight.across() ? &launch_chosen<T, kBackward, kActivation, true, true,
                                                          Pingpong192, Pingpong128, Tiles...>
                                         : &launch_chosen<T, kBackward, kActivation, true, false,
                                                          Pingpong192, Pingpong128, Tiles...>;
  launch(problem, choice);
}

template <typename T>
void launch_gated_backward(const RowsLaunch& problem, const RowsChoice& choice) {
  launch_backward<T, Activation::kSwiglu, Pingpong192Pair>(problem, choice);
}

// One tile, with clusters that share weights, but where halves of whole blocks of columns ask for
// another.
template <typename T>
void launch_glu_up(const RowsLaunch& problem, bool in_turns, const RowsChoice& choice) {
  constexpr auto kUp = Epilogue::kActivation;
  constexpr auto kGlu = Activation::kGlu, kInTurns = Activation::kGluInTurns;
  const bool across = problem.weight.across();
  if (in_turns) {
    auto* launch = across ? &launch_chosen<T, kUp, kInTurns, true, true, Pingpong192Pair>
                          : &launch_chosen<T, kUp, kInTurns, true, false, Pingpong192Pair>;
    return launch(problem, choice);
  }
  auto* launch = across ? &launch_chosen<T, kUp, kGlu, true, true, Cooperative256Pair>
                        : &launch_chosen<T, kUp, kGlu, true, false, Pingpong192Pair>;
  launch(problem, choice);
}

template <typename T>
void launch_glu_backward(const RowsLaunch& problem, bool in_turns, const RowsChoice& choice) {
  auto* launch = in_turns ? &launch_backward<T, Activation::kGluInTurns>
                          : &launch_backward<T, Activation::kGlu>;
  launch(problem, choice);
}

// One tile: these activations are used in older models, whose sizes suit it but for very wide
// experts with many rows each (docs/hopper.md).
template <typename T, Epilogue kEpilogue>
void launch_plain(const RowsLaunch& problem, Activation activation, const RowsChoice& choice) {
  const auto run = [&](auto kind) {
    constexpr Activation kActivation = decltype(kind)::value;
    auto* launch = problem.weight.across()
                       ? &launch_chosen<T, kEpilogue, kActivation, true, true, Pingpong192Pair>
                       : &launch_chosen<T, kEpilogue, kActivation, true, false, Pingpong192Pair>;
    launch(problem, choice);
  };
  switch (activation) {
    case Activation::kGelu:
      return run(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kReluSquared:
      return run(std::integral_constant<Activation, Activation::kReluSquared>{});
    case Activation::kSwiglu:
    case Activation::kGlu:
    case Activation::kGluInTurns:
      STD_TORCH_CHECK(false, "moeops: a gated activation reached the kernels of plain ones.");
  }
}

template <typename T>
void launch_plain_up(const RowsLaunch& problem, Activation activation, const RowsChoice& choice) {
  launch_plain<T, Epilogue::kActivation>(problem, activation, choice);
}

template <typename T>
void launch_plain_backward(const RowsLaunch& problem, Activation activation,
                           const RowsChoice& choice) {
  launch_plain<T, Epilogue::kActivationBackward>(problem, activation, choice);
}

}  // namespace moeops::cuda::hopper
