// Activations of the expert block: value and slope of one element, in the accumulate type.
#pragma once

#include <cmath>

namespace moeops::cpu {

template <typename acc_t>
acc_t sigmoid(acc_t x) {
  return 1 / (1 + std::exp(-x));
}

struct Silu {
  template <typename acc_t>
  static acc_t value(acc_t x) {
    return x * sigmoid(x);
  }
  template <typename acc_t>
  static acc_t slope(acc_t x) {
    const acc_t s = sigmoid(x);
    return s * (1 + x * (1 - s));
  }
};

// Exact GELU, x * Phi(x).
struct Gelu {
  template <typename acc_t>
  static acc_t value(acc_t x) {
    constexpr acc_t kInvSqrt2 = acc_t(0.70710678118654752440);
    return x * acc_t(0.5) * (1 + std::erf(x * kInvSqrt2));
  }
  template <typename acc_t>
  static acc_t slope(acc_t x) {
    constexpr acc_t kInvSqrt2 = acc_t(0.70710678118654752440);
    constexpr acc_t kInvSqrt2Pi = acc_t(0.39894228040143267794);
    return acc_t(0.5) * (1 + std::erf(x * kInvSqrt2)) +
           x * kInvSqrt2Pi * std::exp(acc_t(-0.5) * x * x);
  }
};

// Written so that NaN stays NaN.
struct Relu {
  template <typename acc_t>
  static acc_t value(acc_t x) {
    return x < 0 ? acc_t(0) : x;
  }
  template <typename acc_t>
  static acc_t slope(acc_t x) {
    return x <= 0 ? acc_t(0) : acc_t(1);
  }
};

struct ReluSquared {
  template <typename acc_t>
  static acc_t value(acc_t x) {
    return x < 0 ? acc_t(0) : x * x;
  }
  template <typename acc_t>
  static acc_t slope(acc_t x) {
    return x <= 0 ? acc_t(0) : 2 * x;
  }
};

}  // namespace moeops::cpu
