// Activations of the expert block: value and slope of one element, in the accumulate type.
#pragma once

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
