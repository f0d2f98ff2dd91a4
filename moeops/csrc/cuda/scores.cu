// score_sums, alignment_sum and their backwards on CUDA.
#include <torch/csrc/stable/library.h>

#include "common.h"
#include "device_dispatch.h"
#include "kernels/scores.cuh"
#include "text.h"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarpSize;
// Enough warps to hide the latency of one row each; more would only make more partial sums.
constexpr int64_t kBlocksPerSm = 6;

void check_logits(const char* op, const Tensor& logits, const Text& score) {
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  check_score(op, score);
  check_register_experts(op, logits.size(1));
}

Tensor score_sums(const Tensor& logits, const Text& score) {
  constexpr auto kOp = "score_sums";
  check_logits(kOp, logits, score);
  DeviceGuard guard(logits.get_device_index());
  const int64_t num_tokens = logits.size(0);
  const int num_experts = static_cast<int>(logits.size(1));
  const ScalarType acc = accumulate_type(logits.scalar_type());
  if (logits.numel() == 0) return torch::stable::new_zeros(logits, {num_experts}, acc);
  const Tensor z = as_contiguous(logits);
  const int64_t most = kBlocksPerSm * device_limits(logits.get_device_index()).num_sms;
  const auto blocks = static_cast<int>(std::min(ceil_div(num_tokens, kWarpsPerBlock), most));
  Tensor sums = empty_on(logits, {num_experts}, acc);
  // One block's sums are the result.
  Tensor partial = blocks == 1 ? sums : empty_on(logits, {blocks, num_experts}, acc);
  const cudaStream_t stream = current_stream(logits);
  MOEOPS_DISPATCH_DEVICE_FLOAT(z.scalar_type(), kOp, [&] {
    using Acc = device_accumulate_t<scalar_t>;
    MOEOPS_DISPATCH_SLOTS(num_experts, [&] {
      auto* kernel = score == "sigmoid" ? &score_sums_kernel<scalar_t, kSlots, true>
                                        : &score_sums_kernel<scalar_t, kSlots, false>;
      const size_t shared = kWarpsPerBlock / 2 * num_experts * sizeof(Acc);
      allow_shared_bytes(kernel, shared);
      kernel<<<blocks, kThreads, shared, stream>>>(static_cast<const scalar_t*>(z.data_ptr()),
                                                   num_tokens, num_experts,
                                                   static_cast<Acc*>(partial.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    if (blocks > 1) {
      add_partial_sums_kernel<Acc>
          <<<grid_blocks(num_experts, kWarpSize), kWarpSize * kWarpSize, 0, stream>>>(
              static_cast<const Acc*>(partial.data_ptr()), blocks, num_experts,
              static_cast<Acc*>(sums.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return sums;
}

Tensor score_sums_backward(const Tensor& grad_sums, const Tensor& logits, const Text& score) {
  constexpr auto kOp = "score_sums_backward";
  check_logits(kOp, logits, score);
  check_dim(kOp, "grad_sums", grad_sums, 1);
  check_size(kOp, "grad_sums", grad_sums, 0, logits.size(1));
  check_type(kOp, "grad_sums", grad_sums, accumulate_type(logits.scalar_type()),
             "float32 (float64 for float64 logits)");
  check_same_device(kOp, "grad_sums", grad_sums, logits);
  DeviceGuard guard(logits.get_device_index());
  const int64_t num_tokens = logits.size(0);
  const int num_experts = static_cast<int>(logits.size(1));
  Tensor grad_logits = empty_on(logits, logits.sizes(), logits.scalar_type());
  if (logits.numel() == 0) return grad_logits;
  const Tensor g = as_contiguous(grad_sums), z = as_contiguous(logits);
  MOEOPS_DISPATCH_DEVICE_FLOAT(z.scalar_type(), kOp, [&] {
    using Acc = device_accumulate_t<scalar_t>;
    MOEOPS_DISPATCH_SLOTS(num_experts, [&] {
      auto* kernel = score == "sigmoid" ? &score_sums_backward_kernel<scalar_t, kSlots, true>
                                        : &score_sums_backward_kernel<scalar_t, kSlots, false>;
      kernel<<<grid_blocks(num_tokens, kWarpsPerBlock), kThreads, 0, current_stream(logits)>>>(
          static_cast<const Acc*>(g.data_ptr()), static_cast<const scalar_t*>(z.data_ptr()),
          num_tokens, num_experts, static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return grad_logits;
}

Tensor alignment_sum(const Tensor& logits, const Tensor& topk_ids, int64_t experts_per_group) {
  constexpr auto kOp = "alignment_sum";
  check_alignment(kOp, logits, topk_ids, experts_per_group);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const int64_t num_tokens = logits.size(0);
  const ScalarType acc = accumulate_type(logits.scalar_type());
  if (num_tokens == 0) return torch::stable::new_zeros(logits, {}, acc);
  const Tensor z = as_contiguous(logits), ids = as_contiguous(topk_ids);
  const int64_t most = kBlocksPerSm * device_limits(logits.get_device_index()).num_sms;
  const auto blocks = static_cast<int>(std::min(ceil_div(num_tokens, kWarpsPerBlock), most));
  Tensor sum = empty_on(logits, {}, acc);
  Tensor partial = empty_on(logits, {blocks}, acc);
  const cudaStream_t stream = current_stream(logits);
  MOEOPS_DISPATCH_DEVICE_FLOAT(z.scalar_type(), kOp, [&] {
    using Acc = device_accumulate_t<scalar_t>;
    MOEOPS_DISPATCH_SLOTS(logits.size(1), [&] {
      alignment_sum_kernel<scalar_t, kSlots><<<blocks, kThreads, 0, stream>>>(
          static_cast<const scalar_t*>(z.data_ptr()), static_cast<const int64_t*>(ids.data_ptr()),
          num_tokens, static_cast<int>(ids.size(1)), static_cast<int>(z.size(1)),
          static_cast<int>(experts_per_group), static_cast<Acc*>(partial.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    add_block_sums_kernel<Acc><<<1, 1024, 0, stream>>>(static_cast<const Acc*>(partial.data_ptr()),
                                                       blocks, static_cast<Acc*>(sum.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return sum;
}

Tensor alignment_sum_backward(const Tensor& grad_sum, const Tensor& logits, const Tensor& topk_ids,
                              int64_t experts_per_group) {
  constexpr auto kOp = "alignment_sum_backward";
  check_alignment(kOp, logits, topk_ids, experts_per_group);
  check_register_experts(kOp, logits.size(1));
  check_scalar_grad(kOp, "grad_sum", grad_sum, logits);
  DeviceGuard guard(logits.get_device_index());
  const int64_t num_tokens = logits.size(0);
  Tensor grad_logits = empty_on(logits, logits.sizes(), logits.scalar_type());
  if (num_tokens == 0) return grad_logits;
  const Tensor z = as_contiguous(logits), ids = as_contiguous(topk_ids);
  MOEOPS_DISPATCH_DEVICE_FLOAT(z.scalar_type(), kOp, [&] {
    using Acc = device_accumulate_t<scalar_t>;
    MOEOPS_DISPATCH_SLOTS(logits.size(1), [&] {
      alignment_sum_backward_kernel<scalar_t, kSlots>
          <<<grid_blocks(num_tokens, kWarpsPerBlock), kThreads, 0, current_stream(logits)>>>(
              static_cast<const Acc*>(grad_sum.data_ptr()),
              static_cast<const scalar_t*>(z.data_ptr()),
              static_cast<const int64_t*>(ids.data_ptr()), num_tokens,
              static_cast<int>(ids.size(1)), static_cast<int>(z.size(1)),
              static_cast<int>(experts_per_group), static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("score_sums", TORCH_BOX(&score_sums));
  m.impl("score_sums_backward", TORCH_BOX(&score_sums_backward));
  m.impl("alignment_sum", TORCH_BOX(&alignment_sum));
  m.impl("alignment_sum_backward", TORCH_BOX(&alignment_sum_backward));
}

}  // namespace moeops::cuda
