// Dispatch over CUDA's own element types and over registers per lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "checks.h"

// Runs the lambda body with `scalar_t` bound to double, float, __nv_bfloat16 or __half.
#define MOEOPS_DISPATCH_DEVICE_FLOAT(TYPE, NAME, ...)                                    \
  [&] {                                                                                  \
    switch (TYPE) {                                                                      \
      case torch::headeronly::ScalarType::Double: {                                      \
        using scalar_t = double;                                                         \
        return __VA_ARGS__();                                                            \
      }                                                                                  \
      case torch::headeronly::ScalarType::Float: {                                       \
        using scalar_t = float;                                                          \
        return __VA_ARGS__();                                                            \
      }                                                                                  \
      case torch::headeronly::ScalarType::BFloat16: {                                    \
        using scalar_t = __nv_bfloat16;                                                  \
        return __VA_ARGS__();                                                            \
      }                                                                                  \
      case torch::headeronly::ScalarType::Half: {                                        \
        using scalar_t = __half;                                                         \
        return __VA_ARGS__();                                                            \
      }                                                                                  \
      default:                                                                           \
        STD_TORCH_CHECK(false, NAME,                                                     \
                        ": dtype must be float64, float32, bfloat16 or float16. Cast."); \
    }                                                                                    \
  }()

// Runs the lambda body with `scalar_t` bound to the type that kernels accumulate in, double or
// float. Ops of many variants convert half types first, and so have half as many kernels to
// compile.
#define MOEOPS_DISPATCH_ACCUMULATE(TYPE, ...)              \
  [&] {                                                    \
    if ((TYPE) == torch::headeronly::ScalarType::Double) { \
      using scalar_t = double;                             \
      return __VA_ARGS__();                                \
    }                                                      \
    using scalar_t = float;                                \
    return __VA_ARGS__();                                  \
  }()

namespace moeops::cuda {

// The tensor in the type that kernels accumulate in, contiguous.
inline Tensor as_accumulate(const Tensor& t) {
  const auto acc = accumulate_type(t.scalar_type());
  return as_contiguous(t.scalar_type() == acc ? t : torch::stable::to(t, acc));
}

// Kernels that give a warp a token hold its experts in registers, at most kMaxSlots in a lane.
constexpr int kMaxSlots = 64;
constexpr int kMaxRegisterExperts = kMaxSlots * 32;

inline void check_register_experts(const char* op, int64_t num_experts) {
  STD_TORCH_CHECK(num_experts <= kMaxRegisterExperts, op, ": logits must have at most ",
                  kMaxRegisterExperts, " experts on CUDA, got ", num_experts,
                  ". Use fewer experts.");
}

}  // namespace moeops::cuda

// Runs the lambda body with kSlots bound to the smallest register count that holds E / 32 scores
// per lane.
#define MOEOPS_DISPATCH_SLOTS(NUM_EXPERTS, ...)      \
  [&] {                                              \
    const int needed = ((NUM_EXPERTS) + 31) / 32;    \
    auto run = [&](auto slots) {                     \
      constexpr int kSlots = decltype(slots)::value; \
      __VA_ARGS__();                                 \
    };                                               \
    if (needed <= 1) {                               \
      run(std::integral_constant<int, 1>{});         \
    } else if (needed <= 2) {                        \
      run(std::integral_constant<int, 2>{});         \
    } else if (needed <= 4) {                        \
      run(std::integral_constant<int, 4>{});         \
    } else if (needed <= 8) {                        \
      run(std::integral_constant<int, 8>{});         \
    } else if (needed <= 16) {                       \
      run(std::integral_constant<int, 16>{});        \
    } else {                                         \
      run(std::integral_constant<int, kMaxSlots>{}); \
    }                                                \
  }()
