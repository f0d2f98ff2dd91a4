// Dtype dispatch with CUDA's own element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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
