// What the expert block computes between its two products, for the CPU and the CUDA kernels.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <string>

namespace moeops {

struct ActivationOptions {
  std::string name;
  // Of gated units alone.
  double alpha;
  std::optional<double> limit;
  double offset;
  bool interleaved;  // a row of the pre-activation is gate and up in turns, else all of the gate
                     // first

  bool gated() const { return name == "swiglu" || name == "geglu_tanh"; }
  // silu(gate) * up, with all of the gate first.
  bool plain_swiglu() const {
    return name == "swiglu" && alpha == 1 && !limit && offset == 0 && !interleaved;
  }
};

// A gated unit is gate * sigmoid(gate * (alpha + cubic * gate^2)) * (up + offset), with gate at
// most limit and up within it: with cubic = 0 a SiLU, and GELU's tanh form is a sigmoid of twice
// its argument.
template <typename T>
struct GluConstants {
  T alpha, cubic, limit, offset;

  static GluConstants of(const ActivationOptions& options) {
    const bool tanh_form = options.name == "geglu_tanh";
    const double gelu = 2 * std::sqrt(2 / 3.14159265358979323846);
    return {static_cast<T>(tanh_form ? gelu : options.alpha),
            static_cast<T>(tanh_form ? 0.044715 * gelu : 0.0),
            static_cast<T>(options.limit.value_or(std::numeric_limits<double>::infinity())),
            static_cast<T>(options.offset)};
  }
};

}  // namespace moeops
