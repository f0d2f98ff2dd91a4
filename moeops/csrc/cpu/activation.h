// Activations of the expert block: value and slope of one element, in the accumulate type; of gated
// units those of the gate, and what becomes of the up half.
#pragma once

#include "activation_options.h"
#include "cpu/vector_math.h"

namespace moeops::cpu {

template <typename acc_t>
MOEOPS_VECTOR_INLINE acc_t sigmoid(acc_t x) {
  return 1 / (1 + exponential(-x));
}

struct Silu {
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t value(acc_t x) {
    return x * sigmoid(x);
  }
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t slope(acc_t x) {
    const acc_t s = sigmoid(x);
    return s * (1 + x * (1 - s));
  }
};

struct Swiglu : Silu {
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t up(acc_t u) {
    return u;
  }
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t up_slope(acc_t) {
    return 1;
  }
};

// A gated unit with options. Comparisons are written so that NaN stays NaN; what is clamped has no
// slope, its limits themselves have.
template <typename acc_t>
struct Glu : GluConstants<acc_t> {
  using Constants = GluConstants<acc_t>;
  using Constants::alpha, Constants::cubic, Constants::limit, Constants::offset;

  explicit Glu(const ActivationOptions& options) : Constants(Constants::of(options)) {}

  // Kept finite: times a cubic of zero an infinity would be NaN.
  MOEOPS_VECTOR_INLINE acc_t cubic_part(acc_t g) const {
    constexpr acc_t kLargest = std::is_same_v<acc_t, float> ? acc_t(1e30) : acc_t(1e300);
    const acc_t square = g * g;
    return cubic * (square > kLargest ? kLargest : square);
  }
  MOEOPS_VECTOR_INLINE acc_t value(acc_t gate) const {
    const acc_t g = gate > limit ? limit : gate;
    return g * sigmoid(g * (alpha + cubic_part(g)));
  }
  MOEOPS_VECTOR_INLINE acc_t slope(acc_t gate) const {
    const acc_t g = gate > limit ? limit : gate;
    const acc_t part = cubic_part(g);
    const acc_t s = sigmoid(g * (alpha + part));
    const acc_t inside = s * (1 + g * (1 - s) * (alpha + 3 * part));
    return gate > limit ? acc_t(0) : inside;
  }
  MOEOPS_VECTOR_INLINE acc_t up(acc_t u) const {
    const acc_t below = u > limit ? limit : u;
    return (below < -limit ? -limit : below) + offset;
  }
  MOEOPS_VECTOR_INLINE acc_t up_slope(acc_t u) const {
    return u > limit || u < -limit ? acc_t(0) : acc_t(1);
  }
};

// Exact GELU, x * Phi(x).
struct Gelu {
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t value(acc_t x) {
    return x * normal_cdf(x);
  }
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t slope(acc_t x) {
    return normal_cdf(x) + x * normal_density(x);
  }
};

// Written so that NaN stays NaN.
struct Relu {
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t value(acc_t x) {
    return x < 0 ? acc_t(0) : x;
  }
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t slope(acc_t x) {
    return x <= 0 ? acc_t(0) : acc_t(1);
  }
};

struct ReluSquared {
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t value(acc_t x) {
    return x < 0 ? acc_t(0) : x * x;
  }
  template <typename acc_t>
  static MOEOPS_VECTOR_INLINE acc_t slope(acc_t x) {
    return x <= 0 ? acc_t(0) : 2 * x;
  }
};

}  // namespace moeops::cpu
