// Calls into torch's own ops that the stable headers do not wrap.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

namespace moeops {

using torch::stable::Tensor;

// Switches gradient mode off while it lives: ops with out= refuse inputs that require a gradient,
// and our kernels run in gradient mode wherever an op without a registered gradient is called
// directly.
class NoGradGuard {
 public:
  NoGradGuard() : was_enabled_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGradGuard() { aoti_torch_grad_mode_set_enabled(was_enabled_); }
  NoGradGuard(const NoGradGuard&) = delete;
  NoGradGuard& operator=(const NoGradGuard&) = delete;

 private:
  bool was_enabled_;
};

// out = a @ b, written in place; all three are 2-D. Needs a NoGradGuard.
inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

// out = input @ weight.T + bias, written in place and rounded once; all are 2-D but for bias
// [columns]. Needs a NoGradGuard.
inline void linear_out(Tensor& out, const Tensor& input, const Tensor& weight, const Tensor& bias) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(input), torch::stable::detail::from(weight),
      torch::stable::detail::from(std::optional<Tensor>(bias)), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

// torch._grouped_mm(a, b, offs): a [N, K] x b [E, K, M] -> [N, M], or a [M, N] x b [N, K] -> [E, M,
// K].
inline Tensor grouped_mm(const Tensor& a, const Tensor& b, const Tensor& offs) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(a),
      torch::stable::detail::from(b),
      torch::stable::detail::from(std::optional<Tensor>(offs)),
      torch::stable::detail::from(std::nullopt),
      torch::stable::detail::from(std::nullopt),
  };
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Order of `values` [N] by falling value, ties by position: int64 [N].
inline Tensor argsort_descending(const Tensor& values) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(values),
      torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(static_cast<int64_t>(0)),
      torch::stable::detail::from(true),
  };
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  Tensor sorted = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

}  // namespace moeops
