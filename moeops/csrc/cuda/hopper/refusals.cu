// What the Hopper kernels do not take, each rule with its reason.
#include <cstdlib>
#include <string_view>

#include "hopper/hopper.h"

namespace moeops::cuda::hopper {

namespace {

constexpr int64_t kVectorElements = 8;  // 16 bytes, the unit of every copy
constexpr uintptr_t kAlignment = 16;
constexpr int64_t kMaxExperts = int64_t{1} << 24;  // beside the row count in a word of the table

bool aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % kAlignment == 0;
}

std::string_view forced_kernels() {
  const char* value = std::getenv("MOEOPS_KERNELS");
  const std::string_view kernels = value == nullptr ? "auto" : value;
  STD_TORCH_CHECK(kernels == "auto" || kernels == "general" || kernels == "hopper",
                  "moeops: MOEOPS_KERNELS must be auto, general or hopper, got '", value,
                  "'. Correct it, or unset it.");
  return kernels;
}

}  // namespace

const char* refusal(const Tensor& like) {
  if (forced_kernels() == "general") return "MOEOPS_KERNELS is general";
#ifndef MOEOPS_HOPPER
  return "moeops was built without compute capability 9.0a";
#endif
  if (device_limits(like.get_device_index()).capability_major != 9) {
    return "wgmma exists on compute capability 9 only";
  }
  if (like.scalar_type() != ScalarType::BFloat16 && like.scalar_type() != ScalarType::Half) {
    return "the products are of bfloat16 or float16";
  }
  return nullptr;
}

const char* width_refusal(int64_t width) {
  if (width <= 0) return "a matrix is empty";
  if (width % kVectorElements != 0) return "widths must be multiples of 8, 16 bytes";
  return nullptr;
}

const char* bias_refusal(const std::optional<Tensor>& bias) {
  constexpr uintptr_t kPair = 4;
  if (bias && reinterpret_cast<uintptr_t>(bias->data_ptr()) % kPair != 0) {
    return "biases must begin at a multiple of 4 bytes";
  }
  return nullptr;
}

const char* rows_refusal(const Tensor& rows) {
  if (rows.size(0) == 0) return "there are no rows";
  if (rows.size(0) >= kMaxRows) return "there are 2^30 rows or more";
  if (!aligned(rows)) return "rows must begin at a multiple of 16 bytes";
  return width_refusal(rows.size(1));
}

const char* weight_refusal(const Tensor& weight) {
  if (!aligned(weight)) return "weights must begin at a multiple of 16 bytes";
  if (weight.size(0) >= kMaxExperts) return "there are 2^24 experts or more";
  const int64_t other = weight.stride(2) == 1 ? weight.stride(1) : weight.stride(2);
  if (weight.stride(2) != 1 && weight.stride(1) != 1) return "weights must have a stride of 1";
  if (other % kVectorElements != 0 ||
      (weight.size(0) > 1 && weight.stride(0) % kVectorElements != 0)) {
    return "strides of weights must be multiples of 8";
  }
  // The driver refuses maps with overlapping or expanded dimensions.
  if (other <= 0 || (weight.size(0) > 1 && weight.stride(0) <= 0)) {
    return "strides of weights must be above 0";
  }
  for (int dim = 1; dim <= 2; ++dim) {
    if (const char* reason = width_refusal(weight.size(dim))) return reason;
  }
  return nullptr;
}

bool takes(const char* op, std::initializer_list<const char*> reasons) {
  for (const char* reason : reasons) {
    if (reason == nullptr) continue;
    STD_TORCH_CHECK(forced_kernels() != "hopper", op, ": MOEOPS_KERNELS=hopper, but ", reason,
                    ". Change the inputs, or unset it.");
    return false;
  }
  return true;
}

}  // namespace moeops::cuda::hopper
