// Each expert's share of a token's scores, shared by the ops that sum them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {  // clones for several vector widths must not be merged across files

// Independent partial results of a sum or a maximum: one chain would keep it from becoming vector
// code.
constexpr int64_t kLanes = 16;

// Tokens whose shares are added up in one go. A long sum in float32 would lose digits, and one per
// thread would depend on the number of threads.
constexpr int64_t kTokensPerSum = 64;

template <typename acc_t>
inline acc_t largest_of(const acc_t* values, int64_t count) {
  acc_t lanes[kLanes];
  for (auto& lane : lanes) lane = -std::numeric_limits<acc_t>::infinity();
  int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = values[e + i] > lanes[i] ? values[e + i] : lanes[i];
    }
  }
  acc_t top = lanes[0];
  for (; e < count; ++e) top = values[e] > top ? values[e] : top;
  for (const acc_t lane : lanes) top = lane > top ? lane : top;
  return top;
}

// Lanes are added up in pairs: one after the other would round as often as there are lanes.
template <typename acc_t>
inline acc_t sum_of(const acc_t* values, int64_t count) {
  acc_t lanes[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += values[e + i];
  }
  acc_t even = 0, odd = 0;
  for (; e + 2 <= count; e += 2) {
    even += values[e];
    odd += values[e + 1];
  }
  if (e < count) even += values[e];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0] + (even + odd);
}

// powers[e] becomes the score of z[e] times a factor that all experts share; returns what divides
// them into shares. The largest is at least 1 / 2, so that nothing is divided by zero. `slopes`,
// if it is asked for, becomes the derivative of log score.
template <typename Sigmoid, typename acc_t>
inline acc_t score_powers(Sigmoid, const acc_t* __restrict z, acc_t* __restrict powers,
                          acc_t* __restrict slopes, int64_t num_experts) {
  acc_t top = largest_of(z, num_experts);
  if constexpr (Sigmoid::value) {
    // sigmoid(z) = exp(min(z, 0)) / (1 + exp(-|z|)), taken relative to exp(min(top, 0)).
    top = top < 0 ? top : acc_t(0);
    for (int64_t e = 0; e < num_experts; ++e) {
      const acc_t below = z[e] > 0 ? acc_t(0) : z[e];
      const acc_t power = exponential(z[e] > 0 ? -z[e] : z[e]);
      powers[e] = exponential(below - top) / (1 + power);
      if (slopes) slopes[e] = (z[e] > 0 ? power : acc_t(1)) / (1 + power);
    }
  } else {
    for (int64_t e = 0; e < num_experts; ++e) powers[e] = exponential(z[e] - top);
  }
  return sum_of(powers, num_experts);
}

// powers[e] = exp(z[e] - top), whose sum is returned; `powers` may be `z`.
template <typename acc_t>
MOEOPS_WIDEST_VECTORS acc_t softmax_powers(const acc_t* z, acc_t top, acc_t* powers,
                                           int64_t count) {
  for (int64_t e = 0; e < count; ++e) powers[e] = exponential(z[e] - top);
  return sum_of(powers, count);
}

// shares = softmax(z).
template <typename acc_t>
MOEOPS_WIDEST_VECTORS void softmax_row(const acc_t* __restrict z, acc_t* __restrict shares,
                                       int64_t count) {
  const acc_t top = largest_of(z, count);
  for (int64_t e = 0; e < count; ++e) shares[e] = exponential(z[e] - top);
  const acc_t sum = sum_of(shares, count);
  for (int64_t e = 0; e < count; ++e) shares[e] /= sum;
}

template <typename acc_t>
MOEOPS_WIDEST_VECTORS void sigmoid_row(const acc_t* __restrict z, acc_t* __restrict scores,
                                       int64_t count) {
  for (int64_t e = 0; e < count; ++e) scores[e] = sigmoid(z[e]);
}

// Loads a token's logits; whether all of them are finite.
template <typename scalar_t>
MOEOPS_WIDEST_VECTORS bool load_row(const scalar_t* __restrict row, int64_t num_experts,
                                    accumulate_t<scalar_t>* __restrict z) {
  using acc_t = accumulate_t<scalar_t>;
  int32_t bad = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    z[e] = static_cast<acc_t>(row[e]);
    bad |= !(std::abs(z[e]) <= std::numeric_limits<acc_t>::max());
  }
  return bad == 0;
}

template <typename Sigmoid, typename scalar_t>
MOEOPS_WIDEST_VECTORS void add_shares(Sigmoid sigmoid, const scalar_t* __restrict logits,
                                      accumulate_t<scalar_t>* __restrict z,
                                      accumulate_t<scalar_t>* __restrict powers,
                                      accumulate_t<scalar_t>* __restrict sums,
                                      int64_t num_experts) {
  using acc_t = accumulate_t<scalar_t>;
  for (int64_t e = 0; e < num_experts; ++e) z[e] = static_cast<acc_t>(logits[e]);
  const acc_t factor =
      1 / score_powers(sigmoid, z, powers, static_cast<acc_t*>(nullptr), num_experts);
  for (int64_t e = 0; e < num_experts; ++e) sums[e] += powers[e] * factor;
}

// With shares q and slopes d: grad_z = q * d * (g - <g, q>); softmax has d = 1.
template <typename Sigmoid, typename scalar_t, typename grad_t>
MOEOPS_WIDEST_VECTORS void share_grads(Sigmoid sigmoid,
                                       const accumulate_t<scalar_t>* __restrict grad_sums,
                                       const scalar_t* __restrict logits,
                                       accumulate_t<scalar_t>* __restrict scratch,
                                       int64_t num_experts, grad_t* __restrict grad_logits) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t* __restrict z = scratch;
  acc_t* __restrict powers = z + num_experts;
  acc_t* __restrict slopes = powers + num_experts;
  for (int64_t e = 0; e < num_experts; ++e) z[e] = static_cast<acc_t>(logits[e]);
  const acc_t factor = 1 / score_powers(sigmoid, z, powers, slopes, num_experts);
  for (int64_t e = 0; e < num_experts; ++e) z[e] = grad_sums[e] * powers[e];
  const acc_t mean = sum_of(z, num_experts) * factor;
  for (int64_t e = 0; e < num_experts; ++e) {
    acc_t grad = powers[e] * factor * (grad_sums[e] - mean);
    if constexpr (Sigmoid::value) grad *= slopes[e];
    grad_logits[e] = static_cast<grad_t>(grad);
  }
}

// body(std::true_type) for sigmoid, body(std::false_type) for softmax.
template <typename Body>
void with_score(const std::string& score, const Body& body) {
  if (score == "sigmoid") {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace
}  // namespace moeops::cpu
