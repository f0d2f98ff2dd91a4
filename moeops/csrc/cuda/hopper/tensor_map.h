// Tensor maps: what the copy engine knows of a tensor in global memory. Made on the host for each
// launch and passed by value, so nothing has to be kept or updated on the device.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "checks.h"

namespace moeops::cuda::hopper {

constexpr int kMaxMapRank = 4;

// Innermost dimension first. Strides are bytes, of dimensions 1 and up.
struct MapSpec {
  const char* name;
  const void* base;
  int rank;
  std::array<uint64_t, kMaxMapRank> sizes;
  std::array<uint64_t, kMaxMapRank - 1> strides;
  std::array<uint32_t, kMaxMapRank> box;
  int swizzle_bytes;  // 128 or 64, the width of the box
};

// What the driver demands of a map; null where all of it holds.
inline const char* broken_rule(const MapSpec& spec) {
  constexpr uint64_t kAlignment = 16, kMaxSize = 1ull << 32, kMaxStride = 1ull << 40;
  constexpr uint32_t kMaxBox = 256;
  if (reinterpret_cast<uintptr_t>(spec.base) % kAlignment != 0) return "address";
  if (spec.box[0] * 2 != static_cast<uint32_t>(spec.swizzle_bytes)) return "box width";
  for (int i = 0; i < spec.rank; ++i) {
    if (spec.box[i] < 1 || spec.box[i] > kMaxBox) return "box";
    if (spec.sizes[i] < 1 || spec.sizes[i] > kMaxSize) return "size";
  }
  for (int i = 0; i + 1 < spec.rank; ++i) {
    if (spec.strides[i] % kAlignment != 0 || spec.strides[i] >= kMaxStride) return "stride";
  }
  return nullptr;
}

inline PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                  cudaEnableDefault, &found));
#else
  STD_CUDA_CHECK(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr,
                  "moeops: the CUDA driver must offer cuTensorMapEncodeTiled, got a driver without "
                  "it. Update the driver to CUDA 12 or later, or set MOEOPS_KERNELS=general.");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

inline CUtensorMap encode(const MapSpec& spec, ScalarType type) {
  const char* rule = broken_rule(spec);
  STD_TORCH_CHECK(rule == nullptr, "moeops: the tensor map of ", spec.name,
                  " breaks the driver's rule for its ", rule == nullptr ? "" : rule,
                  ". This is an error in moeops: set MOEOPS_KERNELS=general and report it.");
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = find_encoder();
  constexpr std::array<uint32_t, kMaxMapRank> kOnes{1, 1, 1, 1};
  std::array<cuuint64_t, kMaxMapRank> sizes{};
  std::array<cuuint64_t, kMaxMapRank - 1> strides{};
  for (int i = 0; i < spec.rank; ++i) sizes[i] = spec.sizes[i];
  for (int i = 0; i + 1 < spec.rank; ++i) strides[i] = spec.strides[i];
  CUtensorMap map{};
  const CUresult result = encoder(
      &map,
      type == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      spec.rank, const_cast<void*>(spec.base), sizes.data(), strides.data(), spec.box.data(),
      kOnes.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
      spec.swizzle_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "moeops: the tensor map of ", spec.name,
                  " was refused by the driver with error ", static_cast<int>(result),
                  ". This is an error in moeops: set MOEOPS_KERNELS=general and report it.");
  return map;
}

}  // namespace moeops::cuda::hopper
