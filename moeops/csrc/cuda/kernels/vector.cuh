// Wide loads and stores, float conversion and warp reductions for raw pointers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moeops {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Device element types, one for each host scalar type.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using device_accumulate_t = typename Accumulate<T>::type;

__device__ __forceinline__ float to_accumulate(float v) { return v; }
__device__ __forceinline__ double to_accumulate(double v) { return v; }
__device__ __forceinline__ float to_accumulate(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_accumulate(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_accumulate(device_accumulate_t<T> v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// kElements values of T that move as one access.
template <typename T, int kElements>
struct alignas(sizeof(T) * kElements) Vector {
  T value[kElements];
};

template <typename V, typename T>
__device__ __forceinline__ V load_vector(const T* pointer) {
  return *reinterpret_cast<const V*>(pointer);
}

template <typename V, typename T>
__device__ __forceinline__ void store_vector(T* pointer, const V& v) {
  *reinterpret_cast<V*>(pointer) = v;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The expert that owns `row`: the last e with offsets[e] <= row. Needs offsets[0] <= row <
// offsets[num_experts].
__device__ __forceinline__ int expert_of_row(const int32_t* offsets, int num_experts, int64_t row) {
  int low = 0, high = num_experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// offsets[num_experts], kept inside [0, num_rows] so that a wrong plan cannot reach outside its
// buffers.
__device__ __forceinline__ int64_t live_rows(const int32_t* offsets, int num_experts,
                                             int64_t num_rows) {
  const int64_t last = offsets[num_experts];
  return last < 0 ? 0 : (last > num_rows ? num_rows : last);
}

}  // namespace moeops
