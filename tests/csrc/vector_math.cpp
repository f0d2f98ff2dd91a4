// The functions of vector_math.h over arrays, for test_vector_math.py.
#include "cpu/vector_math.h"

#define OVER_ARRAYS(name)                                                  \
  extern "C" void name##_float32(const float* x, float* y, long count) {   \
    for (long i = 0; i < count; ++i) y[i] = moeops::cpu::name(x[i]);       \
  }                                                                        \
  extern "C" void name##_float64(const double* x, double* y, long count) { \
    for (long i = 0; i < count; ++i) y[i] = moeops::cpu::name(x[i]);       \
  }

OVER_ARRAYS(exponential)
OVER_ARRAYS(log1p_of)
OVER_ARRAYS(softplus)
OVER_ARRAYS(erfc)
