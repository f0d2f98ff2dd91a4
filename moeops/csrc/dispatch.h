// Dtype dispatch over the types moeops computes in.
#pragma once

#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

// Runs the lambda body with `scalar_t` bound to the element type.
#define MOEOPS_DISPATCH_FLOAT(TYPE, NAME, ...)                                    \
  THO_DISPATCH_V2(TYPE, NAME, AT_WRAP(__VA_ARGS__), AT_EXPAND(AT_FLOATING_TYPES), \
                  torch::headeronly::ScalarType::BFloat16, torch::headeronly::ScalarType::Half)

namespace moeops {

// float64 accumulates in float64, everything else in float32.
template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

}  // namespace moeops
