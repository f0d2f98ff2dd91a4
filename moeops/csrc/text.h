// A text among the arguments of an op: kernels take it by const Text&, and pass it on as a
// std::string.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdint>
#include <string>

namespace moeops {

struct Text : std::string {
  using std::string::string;
};

}  // namespace moeops

namespace torch::stable::detail {

// As torch converts to std::string, but for a copy that torch (2.11 to 2.13 at least) makes with
// new and never deletes, in every call of an op.
template <>
struct ToImpl<moeops::Text> {
  static moeops::Text call(StableIValue value, uint64_t, bool) {
    StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    moeops::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
