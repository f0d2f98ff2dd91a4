// exp, log1p, softplus and erfc without branches, tables or library calls: a loop over any of them
// becomes vector code, in a function marked MOEOPS_WIDEST_VECTORS at the processor's full width.
//
// Largest errors in units in the last place of the result, measured over the whole range by
// tests/csrc/test_vector_math.py, with fused multiply-adds and without:
//
//                     float32   float64
//   exponential          1.5       1.5
//   log1p_of             2.0       2.0      for 0 <= x <= 1
//   softplus             2.5       2.5
//   erfc                 5.0       6.0
//
// Denormal results are exact to one unit, infinities give the limits, NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Called from clones for several vector widths, a function must be compiled into each of them.
#define MOEOPS_VECTOR_INLINE inline __attribute__((always_inline))

namespace moeops::cpu {

template <typename T>
struct FloatBits;

template <>
struct FloatBits<float> {
  using Bits = uint32_t;
  static constexpr int kFraction = 23;
  static constexpr Bits kBias = 127;
  static constexpr Bits kUpperHalf = 0xfffff000u;  // leaves 12 bits, whose square is exact
  static constexpr float kRound = 12582912.0f;     // 1.5 * 2^23
  static constexpr float kExpLargest = 89.0f, kExpSmallest = -104.0f;  // infinity and zero
  static constexpr float kErfcLargest = 11.0f;                         // zero
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};

template <>
struct FloatBits<double> {
  using Bits = uint64_t;
  static constexpr int kFraction = 52;
  static constexpr Bits kBias = 1023;
  static constexpr Bits kUpperHalf = ~Bits{0x7ffffff};  // leaves 26 bits
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLargest = 710.0, kExpSmallest = -746.0;
  static constexpr double kErfcLargest = 28.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
};

// coefficients[0] + coefficients[1] * x + ..., from the term `kFirst` on.
template <int kFirst = 0, typename T, int N>
MOEOPS_VECTOR_INLINE T polynomial(T x, const T (&coefficients)[N]) {
  if constexpr (kFirst + 1 == N) {
    return coefficients[kFirst];
  } else {
    return coefficients[kFirst] + x * polynomial<kFirst + 1>(x, coefficients);
  }
}

// 2^n for a whole number n that adding kRound left in the low bits of `shifted`.
template <typename T>
MOEOPS_VECTOR_INLINE T power_of_two(T shifted) {
  using Traits = FloatBits<T>;
  typename Traits::Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + Traits::kBias) << Traits::kFraction;
  T power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

// exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2. 2^n is two factors: n itself may be beyond the
// exponents of normal numbers.
template <typename T>
MOEOPS_VECTOR_INLINE T exponential(T x) {
  using Traits = FloatBits<T>;
  x = x > Traits::kExpLargest ? Traits::kExpLargest : x;
  x = x < Traits::kExpSmallest ? Traits::kExpSmallest : x;
  const T n = x * T(1.44269504088896340736) + Traits::kRound - Traits::kRound;
  const T half = n * T(0.5) + Traits::kRound;
  const T rest = n - (half - Traits::kRound) + Traits::kRound;
  const T r = (x - n * Traits::kLn2High) - n * Traits::kLn2Low;
  T p;
  // (exp(r) - 1 - r) / r^2.
  if constexpr (std::is_same_v<T, float>) {
    constexpr float kCoefficients[] = {0.500000001347f,   0.166666666816f,   0.0416664649253f,
                                       0.00833331092548f, 0.00139336499963f, 0.000198909908247f};
    p = polynomial(r, kCoefficients);
  } else {
    constexpr double kCoefficients[] = {0.500000000000000102,     0.166666666666666675,
                                        0.0416666666666241279,    0.00833333333333006183,
                                        0.00138888889172137169,   0.000198412698630536169,
                                        0.0000248015212959543751, 2.75572684599970648e-6,
                                        2.76200884454097482e-7,   2.51003854955103191e-8};
    p = polynomial(r, kCoefficients);
  }
  return (p * r * r + r + 1) * power_of_two(half) * power_of_two(rest);
}

// log(1 + x) for 0 <= x <= 1, by the series of 2 atanh(x / (2 + x)).
template <typename T>
MOEOPS_VECTOR_INLINE T log1p_of(T x) {
  const T s = x / (2 + x), w = s * s;
  T q;
  if constexpr (std::is_same_v<T, float>) {
    constexpr float kCoefficients[] = {0.333333336602637062f, 0.199998531659648587f,
                                       0.142961789971514189f, 0.108532879004401863f,
                                       0.116121646120116744f};
    q = polynomial(w, kCoefficients);
  } else {
    constexpr double kCoefficients[] = {
        0.333333333333333334,  0.199999999999997613,  0.142857142858000496,  0.111111110991183853,
        0.0909090994898135719, 0.0769227198243027464, 0.0666758931572462792, 0.0586713953065159873,
        0.0542258919744000741, 0.0374607189777538365, 0.0781528890046142522};
    q = polynomial(w, kCoefficients);
  }
  return 2 * s + 2 * s * (w * q);
}

// log(1 + exp(x)).
template <typename T>
MOEOPS_VECTOR_INLINE T softplus(T x) {
  return (x < 0 ? T(0) : x) + log1p_of(exponential(x < 0 ? x : -x));
}

// exp(-z * z) for 0 <= z, whose square has more digits than a number holds: the upper half of z has
// an exact square.
template <typename T>
MOEOPS_VECTOR_INLINE T exp_minus_square(T z) {
  using Traits = FloatBits<T>;
  typename Traits::Bits bits;
  std::memcpy(&bits, &z, sizeof(bits));
  bits &= Traits::kUpperHalf;
  T upper;
  std::memcpy(&upper, &bits, sizeof(upper));
  return exponential(-upper * upper) * exponential((upper - z) * (upper + z));
}

MOEOPS_VECTOR_INLINE float erfc(float x) {
  float z = x < 0 ? -x : x;
  z = z > FloatBits<float>::kErfcLargest ? FloatBits<float>::kErfcLargest : z;
  // exp(z^2) * erfc(z) / t with t = 2 / (2 + z), by powers of 2 t - 1.
  constexpr float kCoefficients[] = {0.510791355242f,    0.343580352231f,    0.139735824527f,
                                     0.0182208460518f,   -0.0107522109208f,  -0.00323803464113f,
                                     0.00152909061094f,  0.000417474041837f, -0.000294130316948f,
                                     -2.58461159372e-5f, 3.52819826565e-5f};
  const float t = 2 / (2 + z);
  const float tail = t * polynomial(2 * t - 1, kCoefficients) * exp_minus_square(z);
  return x < 0 ? 2 - tail : tail;
}

// The rational functions of W. J. Cody, Mathematics of Computation 23 (1969), each the quotient of
// two polynomials; all are computed and one is taken.
MOEOPS_VECTOR_INLINE double erfc(double x) {
  constexpr double kSmall = 0.46875;  // above, erfc itself is approximated, below erf(x) / x
  constexpr double kLarge = 4;        // above, by powers of 1 / z^2
  constexpr double kInvSqrtPi = 0.56418958354775628695;
  double z = x < 0 ? -x : x;
  z = z > FloatBits<double>::kErfcLargest ? FloatBits<double>::kErfcLargest : z;
  constexpr double kSmallTop[] = {3.20937758913846947e+03, 3.77485237685302021e+02,
                                  1.13864154151050156e+02, 3.16112374387056560e+00,
                                  1.85777706184603153e-01};
  constexpr double kSmallBottom[] = {2.84423683343917062e+03, 1.28261652607737228e+03,
                                     2.44024637934444173e+02, 2.36012909523441209e+01, 1};
  constexpr double kMiddleTop[] = {
      1.23033935479799725e+03, 2.05107837782607147e+03, 1.71204761263407058e+03,
      8.81952221241769090e+02, 2.98635138197400131e+02, 6.61191906371416295e+01,
      8.88314979438837594e+00, 5.64188496988670089e-01, 2.15311535474403846e-08};
  constexpr double kMiddleBottom[] = {
      1.23033935480374942e+03, 3.43936767414372164e+03, 4.36261909014324716e+03,
      3.29079923573345963e+03, 1.62138957456669019e+03, 5.37181101862009858e+02,
      1.17693950891312499e+02, 1.57449261107098347e+01, 1};
  constexpr double kLargeTop[] = {6.58749161529837803e-04, 1.60837851487422766e-02,
                                  1.25781726111229246e-01, 3.60344899949804439e-01,
                                  3.05326634961232344e-01, 1.63153871373020978e-02};
  constexpr double kLargeBottom[] = {2.33520497626869185e-03, 6.05183413124413191e-02,
                                     5.27905102951428412e-01, 1.87295284992346725e+00,
                                     2.56852019228982242e+00, 1};
  const bool small = z <= kSmall, large = z > kLarge;
  const double square = z * z;
  const double inverse = 1 / (large ? square : 1);
  double top = small ? polynomial(square, kSmallTop) : polynomial(z, kMiddleTop);
  double bottom = small ? polynomial(square, kSmallBottom) : polynomial(z, kMiddleBottom);
  top = large ? polynomial(inverse, kLargeTop) : top;
  bottom = large ? polynomial(inverse, kLargeBottom) : bottom;
  const double quotient = top / bottom;
  const double scaled = large ? (kInvSqrtPi - inverse * quotient) / z : quotient;
  const double tail = scaled * exp_minus_square(z);
  const double signed_tail = x < 0 ? 2 - tail : tail;
  return small ? 1 - x * quotient : signed_tail;
}

// The distribution function of the standard normal distribution.
template <typename T>
MOEOPS_VECTOR_INLINE T normal_cdf(T x) {
  return T(0.5) * erfc(x * T(-0.70710678118654752440));
}

// Its density.
template <typename T>
MOEOPS_VECTOR_INLINE T normal_density(T x) {
  return T(0.39894228040143267794) * exponential(T(-0.5) * x * x);
}

}  // namespace moeops::cpu
