// Host-side helpers of the CUDA kernels: stream, device guard, device limits, debug checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdlib>
#include <mutex>
#include <string>

#include "checks.h"

namespace moeops {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

struct DeviceLimits {
  int num_sms = 0;
  int max_shared_bytes = 0;  // per block, with the opt-in
  int capability_major = 0;
  double memory_speed = 0;  // TB/s of the device's own memory, at most
};

constexpr int kMaxDevices = 64;

inline const DeviceLimits& device_limits(int device) {
  static std::array<DeviceLimits, kMaxDevices> limits;
  static std::array<std::once_flag, kMaxDevices> once;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "moeops: device index must be below ",
                  kMaxDevices, ", got ", device, ". Use fewer visible devices.");
  std::call_once(once[device], [device] {
    auto read = [device](cudaDeviceAttr attribute) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    limits[device] = {
        read(cudaDevAttrMultiProcessorCount), read(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        read(cudaDevAttrComputeCapabilityMajor),
        2e-9 / 8 * read(cudaDevAttrMemoryClockRate) * read(cudaDevAttrGlobalMemoryBusWidth)};
  });
  return limits[device];
}

// A contiguous tensor on the device of `like`. The shim takes a quarter of the host time of
// new_empty, which goes through the dispatcher.
inline Tensor empty_on(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                       ScalarType type) {
  constexpr size_t kMaxDims = 4;
  STD_TORCH_CHECK(shape.size() <= kMaxDims, "moeops: a tensor of ", shape.size(),
                  " dimensions was asked for. This is an error in moeops: report it.");
  std::array<int64_t, kMaxDims> strides{};
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), static_cast<int32_t>(type),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// MOEOPS_DEBUG_CHECKS makes the CUDA ops check values (ids, logits), at the price of a host sync
// per op. It is on unless it is unset, empty, 0, false, no or off, in any case, as for debug_checks
// in moeops/_checks.py.
inline bool debug_checks() {
  static const bool enabled = [] {
    const char* value = std::getenv("MOEOPS_DEBUG_CHECKS");
    std::string text = value == nullptr ? "" : value;
    for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return !(text.empty() || text == "0" || text == "false" || text == "no" || text == "off");
  }();
  return enabled;
}

// A device counter that kernels raise on bad values and the host reads when debug checks are on.
class DebugCounter {
 public:
  DebugCounter(const Tensor& like, cudaStream_t stream) : stream_(stream) {
    if (!debug_checks()) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone,
                    "moeops: MOEOPS_DEBUG_CHECKS must be off during CUDA graph capture, got 1. "
                    "Unset it and restart.");
    counter_ = torch::stable::new_zeros(like, {1}, ScalarType::Int);
  }

  int32_t* device_pointer() {
    return counter_.defined() ? static_cast<int32_t*>(counter_.data_ptr()) : nullptr;
  }

  // How many bad values the kernels saw; waits for them.
  int32_t read() {
    if (!counter_.defined()) return 0;
    int32_t count = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&count, counter_.data_ptr(), sizeof(count),
                                   cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return count;
  }

 private:
  cudaStream_t stream_;
  Tensor counter_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a grid-stride loop over `work` items: enough to fill the device, no more than the
// grid's limit.
inline unsigned grid_blocks(int64_t work, int64_t per_block) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(work, per_block), 1, kMaxBlocks));
}

template <typename Kernel>
void allow_shared_bytes(Kernel kernel, size_t bytes) {
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (bytes > kWithoutOptIn) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  }
}

}  // namespace moeops
