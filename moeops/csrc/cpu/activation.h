// Activations of the expert block: value and slope of one element, in the accumulate type.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace moeops::cpu {

inline double exponential(double x) { return std::exp(x); }

// exp within 2 units in the last place, in plain arithmetic that a compiler turns into vector code
// (the polynomial is Cephes' expf). Saturates near 2^127 and 2^-126 instead of reaching infinity
// and zero; NaN stays NaN.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return mantissa * power;
}

template <typename acc_t>
acc_t sigmoid(acc_t x) {
  return 1 / (1 + exponential(-x));
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
           x * kInvSqrt2Pi * exponential(acc_t(-0.5) * x * x);
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
