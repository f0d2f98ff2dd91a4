// The expert block on CUDA: moe_mlp, and its backward in two ops.
//
// Forward: gather rows, up projection, activation, down projection, weighted sum. Only x and the
// pre-activation are kept; the backward gathers x and grad_y again and folds the routing weight
// into the activation's gradient, so the down projection's output is never needed: d weight =
// <d hidden, hidden>. On Hopper the products gather and activate by themselves (hopper/).
//
// moe_mlp_backward_data computes what tokens wait for, moe_mlp_backward_weights the rest from the
// rows that it returns.
#include <torch/csrc/stable/library.h>

#include "checks/moe_mlp.h"
#include "common.h"
#include "device_dispatch.h"
#include "expert_block.h"
#include "permute.h"
#include "text.h"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarpSize;
constexpr int kVectorBytes = 16;

// Of options that were checked.
Activation parse_activation(const ActivationOptions& options) {
  const std::string& name = options.name;
  if (options.plain_swiglu()) return Activation::kSwiglu;
  if (options.gated()) return options.interleaved ? Activation::kGluInTurns : Activation::kGlu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  return Activation::kReluSquared;
}

// Runs f with the activation as a compile-time constant.
template <typename F>
void dispatch_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kSwiglu:
      return f(std::integral_constant<Activation, Activation::kSwiglu>{});
    case Activation::kGlu:
      return f(std::integral_constant<Activation, Activation::kGlu>{});
    case Activation::kGluInTurns:
      return f(std::integral_constant<Activation, Activation::kGluInTurns>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kReluSquared:
      return f(std::integral_constant<Activation, Activation::kReluSquared>{});
  }
}

std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return as_contiguous(*t);
}

Block make_block(const char* op, const Tensor& x, const Tensor& topk_weights, const Tensor& w_up,
                 const Tensor& w_down, const std::optional<Tensor>& b_up,
                 const std::optional<Tensor>& b_down, const Tensor& row_to_pair,
                 const Tensor& pair_to_row, const Tensor& expert_offsets,
                 const ActivationOptions& activation) {
  check_moe_mlp(op, x, topk_weights, w_up, w_down, b_up, b_down, row_to_pair, pair_to_row,
                expert_offsets, activation);
  const cudaStream_t stream = current_stream(x);
  return {{as_contiguous(x), as_contiguous(topk_weights), as_contiguous(row_to_pair),
           as_contiguous(pair_to_row),
           plan_rows(as_contiguous(expert_offsets), row_to_pair.size(0), x, stream), stream},
          w_up,
          w_down,
          contiguous_or_none(b_up),
          contiguous_or_none(b_down),
          parse_activation(activation),
          GluConstants<double>::of(activation)};
}

// Threads along a row, whole warps, and rows per block.
dim3 row_group(int64_t hidden_width, int elements) {
  const int64_t along = ceil_div(ceil_div(hidden_width, elements), kWarpSize) * kWarpSize;
  const int x = static_cast<int>(std::clamp<int64_t>(along, kWarpSize, kActivationThreads));
  return dim3(x, kActivationThreads / x);
}

template <typename T>
GluConstants<T> constants(const Block& block) {
  const GluConstants<double>& unit = block.unit;
  return {static_cast<T>(unit.alpha), static_cast<T>(unit.cubic), static_cast<T>(unit.limit),
          static_cast<T>(unit.offset)};
}

// Whole vectors along the hidden dimension; buffers are fresh allocations or contiguous inputs.
bool vectors_fit(const Block& block, std::initializer_list<const Tensor*> buffers) {
  uintptr_t bits = static_cast<uintptr_t>(block.hidden_width()) * block.x.element_size();
  for (const Tensor* buffer : buffers) bits |= reinterpret_cast<uintptr_t>(buffer->data_ptr());
  return bits % kVectorBytes == 0;
}

Tensor gather(const Tensor& x, const PlannedTokens& block) {
  Tensor rows = empty_on(x, {block.num_rows(), x.size(1)}, x.scalar_type());
  permute(x, block.pair_to_row, block.plan.offsets, rows, block.stream);
  return rows;
}

// hidden = act(pre + b_up); pre keeps the sum.
Tensor activate_rows(const Block& block, Tensor& pre) {
  Tensor hidden = empty_on(pre, {block.num_rows(), block.hidden_width()}, pre.scalar_type());
  if (hidden.numel() == 0) return hidden;
  bool vectors = vectors_fit(block, {&pre, &hidden});
  if (block.b_up) vectors = vectors && vectors_fit(block, {&*block.b_up});
  MOEOPS_DISPATCH_DEVICE_FLOAT(pre.scalar_type(), "moe_mlp", [&] {
    dispatch_activation(block.activation, [&](auto kind) {
      constexpr int kElements = kVectorBytes / sizeof(scalar_t);
      auto* kernel = vectors ? &activation_kernel<scalar_t, decltype(kind)::value, kElements>
                             : &activation_kernel<scalar_t, decltype(kind)::value, 1>;
      const dim3 group = row_group(block.hidden_width(), vectors ? kElements : 1);
      kernel<<<grid_blocks(block.num_rows(), group.y), group, 0, block.stream>>>(
          static_cast<scalar_t*>(pre.data_ptr()),
          block.b_up ? static_cast<const scalar_t*>(block.b_up->data_ptr()) : nullptr,
          block.offsets_data(), block.num_experts(), block.num_rows(), block.hidden_width(),
          constants<device_accumulate_t<scalar_t>>(block),
          static_cast<scalar_t*>(hidden.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return hidden;
}

void add_down_bias(const Block& block, Tensor& y) {
  if (!block.b_down || y.numel() == 0) return;
  MOEOPS_DISPATCH_DEVICE_FLOAT(y.scalar_type(), "moe_mlp", [&] {
    using Acc = device_accumulate_t<scalar_t>;
    constexpr int kElements = kVectorBytes / sizeof(scalar_t);
    const bool vectors =
        y.size(1) % kElements == 0 && (reinterpret_cast<uintptr_t>(y.data_ptr()) |
                                       reinterpret_cast<uintptr_t>(block.b_down->data_ptr())) %
                                              kVectorBytes ==
                                          0;
    auto* kernel = vectors ? &add_weighted_bias_kernel<scalar_t, kElements>
                           : &add_weighted_bias_kernel<scalar_t, 1>;
    kernel<<<grid_blocks(y.size(0), kWarpsPerBlock), kThreads, 0, block.stream>>>(
        static_cast<const scalar_t*>(block.b_down->data_ptr()),
        static_cast<const Acc*>(block.topk_weights.data_ptr()),
        static_cast<const int32_t*>(block.pair_to_row.data_ptr()), block.offsets_data(),
        block.num_experts(), y.size(0), static_cast<int>(block.pair_to_row.size(1)),
        block.num_rows(), y.size(1), static_cast<scalar_t*>(y.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// The general path: rows gathered, multiplied, activated and multiplied in passes of their own.
Tensor general_rows(const Block& block, Tensor& pre) {
  constexpr auto kOp = "moe_mlp";
  pre = grouped_matmul(kOp, gather(block.x, block), block.w_up, block.plan, std::nullopt,
                       block.stream);
  const Tensor hidden = activate_rows(block, pre);
  return grouped_matmul(kOp, hidden, block.w_down, block.plan, std::nullopt, block.stream);
}

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& row_to_pair,
                                   const Tensor& pair_to_row, const Tensor& expert_offsets,
                                   const Tensor& topk_weights, const Tensor& w_up,
                                   const Tensor& w_down, const std::optional<Tensor>& b_up,
                                   const std::optional<Tensor>& b_down, const Text& name,
                                   double alpha, std::optional<double> limit, double offset,
                                   bool interleaved, bool keep_pre) {
  constexpr auto kOp = "moe_mlp";
  const ActivationOptions activation{name, alpha, limit, offset, interleaved};
  DeviceGuard guard(x.get_device_index());
  const Block block = make_block(kOp, x, topk_weights, w_up, w_down, b_up, b_down, row_to_pair,
                                 pair_to_row, expert_offsets, activation);
  Tensor y = empty_on(x, {x.size(0), block.out_width()}, x.scalar_type());
  Tensor pre, rows;
  if (hopper::takes_block(kOp, block, {})) {
    if (keep_pre) pre = empty_on(x, {block.num_rows(), w_up.size(1)}, x.scalar_type());
    rows = hopper::expert_rows(block, pre);
  } else {
    rows = general_rows(block, pre);
  }
  if (keep_pre) {
    zero_tail(pre, block.plan.offsets, block.stream);
  } else {
    pre = empty_on(x, {0, w_up.size(1)}, x.scalar_type());
  }
  unpermute(rows, block.topk_weights, block.pair_to_row, block.plan.offsets, y, block.stream);
  add_down_bias(block, y);
  return {y, pre};
}

// Pointwise backward: the outputs of `grads` that are wanted, and grad_pre where x's gradient needs
// it.
void activation_backward(const Block& block, const Tensor& pre, const Tensor& grad_hidden,
                         const Tensor& grad_y, const NeededData& needed, DataGrads& grads) {
  const bool need_grad_pre = needed.x || needed.grad_pre;
  const auto type = pre.scalar_type();
  if (need_grad_pre) grads.pre = empty_on(pre, pre.sizes(), type);
  if (needed.weighted_hidden) grads.weighted_hidden = empty_on(pre, grad_hidden.sizes(), type);
  if (block.num_rows() == 0) return;
  bool vectors = vectors_fit(block, {&pre, &grad_hidden});
  if (need_grad_pre) vectors = vectors && vectors_fit(block, {&grads.pre});
  if (needed.weighted_hidden) vectors = vectors && vectors_fit(block, {&grads.weighted_hidden});
  MOEOPS_DISPATCH_DEVICE_FLOAT(type, "moe_mlp_backward_data", [&] {
    using Acc = device_accumulate_t<scalar_t>;
    auto data = [](const Tensor& t) { return static_cast<scalar_t*>(t.data_ptr()); };
    ActivationBackwardArgs<scalar_t> args{};
    args.pre = data(pre);
    args.grad_hidden = data(grad_hidden);
    args.topk_weights = static_cast<const Acc*>(block.topk_weights.data_ptr());
    args.grad_y = data(grad_y);
    if (block.b_down) {
      args.b_down = data(*block.b_down);
      args.wide_out =
          (reinterpret_cast<uintptr_t>(args.b_down) | reinterpret_cast<uintptr_t>(args.grad_y) |
           static_cast<uintptr_t>(block.out_width()) * sizeof(scalar_t)) %
              kVectorBytes ==
          0;
    }
    args.row_to_pair = static_cast<const int32_t*>(block.row_to_pair.data_ptr());
    args.offsets = block.offsets_data();
    args.num_experts = block.num_experts();
    args.top_k = static_cast<int>(block.pair_to_row.size(1));
    args.num_rows = block.num_rows();
    args.num_pairs = block.pair_to_row.numel();
    args.hidden_width = block.hidden_width();
    args.out_width = block.out_width();
    args.unit = constants<Acc>(block);
    if (need_grad_pre) args.grad_pre = data(grads.pre);
    if (needed.weighted_hidden) args.weighted_hidden = data(grads.weighted_hidden);
    if (needed.topk_weights) {
      args.grad_topk_weights = static_cast<Acc*>(grads.topk_weights.data_ptr());
    }
    dispatch_activation(block.activation, [&](auto kind) {
      constexpr int kElements = kVectorBytes / sizeof(scalar_t);
      auto* kernel = vectors
                         ? &activation_backward_kernel<scalar_t, decltype(kind)::value, kElements>
                         : &activation_backward_kernel<scalar_t, decltype(kind)::value, 1>;
      const dim3 group = row_group(block.hidden_width(), vectors ? kElements : 1);
      kernel<<<grid_blocks(block.num_rows(), group.y), group, 0, block.stream>>>(args);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

// The general path: grad_y gathered again, the products and the pointwise pass one by one.
void general_data_backward(const Block& block, const Tensor& grad_y, const Tensor& pre,
                           const NeededData& needed, DataGrads& grads) {
  constexpr auto kOp = "moe_mlp_backward_data";
  if (needed.topk_weights) {
    // With as many rows as pairs the kernel meets every pair.
    const bool every_pair_has_a_row = block.num_rows() == block.pair_to_row.numel();
    grads.topk_weights =
        every_pair_has_a_row
            ? empty_on(block.topk_weights, block.topk_weights.sizes(),
                       block.topk_weights.scalar_type())
            : torch::stable::new_zeros(block.topk_weights, block.topk_weights.sizes());
  }
  {
    const Tensor grad_hidden =
        grouped_matmul(kOp, gather(grad_y, block), torch::stable::transpose(block.w_down, 1, 2),
                       block.plan, std::nullopt, block.stream);
    activation_backward(block, pre, grad_hidden, grad_y, needed, grads);
  }
  if (needed.x) {
    const Tensor rows = grouped_matmul(kOp, grads.pre, torch::stable::transpose(block.w_up, 1, 2),
                                       block.plan, std::nullopt, block.stream);
    grads.x = empty_on(block.x, block.x.sizes(), block.x.scalar_type());
    unpermute(rows, std::nullopt, block.pair_to_row, block.plan.offsets, grads.x, block.stream);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward_data(
    const Tensor& grad_y, const Tensor& x, const Tensor& row_to_pair, const Tensor& pair_to_row,
    const Tensor& expert_offsets, const Tensor& topk_weights, const Tensor& w_up,
    const Tensor& w_down, const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_down,
    const Tensor& pre_activation, const Text& name, double alpha, std::optional<double> limit,
    double offset, bool interleaved, bool need_x, bool need_topk_weights, bool need_grad_pre,
    bool need_weighted_hidden) {
  constexpr auto kOp = "moe_mlp_backward_data";
  const ActivationOptions activation{name, alpha, limit, offset, interleaved};
  DeviceGuard guard(x.get_device_index());
  const Block block = make_block(kOp, x, topk_weights, w_up, w_down, b_up, b_down, row_to_pair,
                                 pair_to_row, expert_offsets, activation);
  check_moe_mlp_grads(kOp, grad_y, pre_activation, x, w_up, w_down, row_to_pair);
  const Tensor gy = as_contiguous(grad_y), pre = as_contiguous(pre_activation);
  const NeededData needed{need_x, need_topk_weights, need_grad_pre, need_weighted_hidden};
  const auto none = [&] { return empty_on(x, {0}, x.scalar_type()); };
  DataGrads grads{none(), none(), none(), none()};
  if (hopper::takes_block(kOp, block, {&gy, &pre})) {
    hopper::data_backward(block, gy, pre, needed, grads);
  } else {
    general_data_backward(block, gy, pre, needed, grads);
  }
  if (!need_grad_pre) grads.pre = none();
  if (need_grad_pre) zero_tail(grads.pre, block.plan.offsets, block.stream);
  if (need_weighted_hidden) zero_tail(grads.weighted_hidden, block.plan.offsets, block.stream);
  return {grads.x, grads.topk_weights, grads.pre, grads.weighted_hidden};
}

// The general path: x and grad_y gathered once more.
void general_weight_backward(const PlannedTokens& tokens, const Tensor& grad_y,
                             const Tensor& grad_pre, const Tensor& weighted_hidden,
                             const NeededWeights& needed, Tensor& grad_w_up, Tensor& grad_w_down) {
  const auto gradient = [&](const Tensor& grad, const Tensor& rows, bool transposed) {
    return grouped_weight_grad("moe_mlp_backward_weights", transposed ? rows : grad,
                               transposed ? grad : rows, tokens.plan, tokens.stream);
  };
  if (needed.w_up) {
    grad_w_up = gradient(grad_pre, gather(tokens.x, tokens), needed.transposed_up);
  }
  if (needed.w_down) {
    grad_w_down = gradient(gather(grad_y, tokens), weighted_hidden, needed.transposed_down);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_backward_weights(
    const Tensor& grad_y, const Tensor& x, const Tensor& row_to_pair, const Tensor& pair_to_row,
    const Tensor& expert_offsets, const Tensor& topk_weights, const Tensor& grad_pre,
    const Tensor& weighted_hidden, bool need_w_up, bool need_w_down, bool need_b_up,
    bool need_b_down, bool transposed_up, bool transposed_down) {
  constexpr auto kOp = "moe_mlp_backward_weights";
  DeviceGuard guard(x.get_device_index());
  check_moe_mlp_weight_grads(kOp, grad_y, x, row_to_pair, pair_to_row, expert_offsets, topk_weights,
                             grad_pre, weighted_hidden, need_w_up || need_b_up, need_w_down);
  const cudaStream_t stream = current_stream(x);
  const PlannedTokens tokens{
      as_contiguous(x),
      as_contiguous(topk_weights),
      as_contiguous(row_to_pair),
      as_contiguous(pair_to_row),
      plan_rows(as_contiguous(expert_offsets), row_to_pair.size(0), x, stream),
      stream};
  const Tensor gy = as_contiguous(grad_y), pre = as_contiguous(grad_pre),
               hidden = as_contiguous(weighted_hidden);
  const auto none = [&] { return empty_on(x, {0}, x.scalar_type()); };
  Tensor grad_w_up = none(), grad_w_down = none();
  Tensor grad_b_up = none(), grad_b_down = none();
  const NeededWeights needed{need_w_up, need_w_down, transposed_up, transposed_down};
  if (hopper::takes_weight_grads(kOp, tokens, gy, need_w_up ? &pre : nullptr,
                                 need_w_down ? &hidden : nullptr)) {
    hopper::weight_backward(tokens, gy, pre, hidden, needed, grad_w_up, grad_w_down);
  } else {
    general_weight_backward(tokens, gy, pre, hidden, needed, grad_w_up, grad_w_down);
  }
  if (need_w_up && transposed_up) grad_w_up = torch::stable::transpose(grad_w_up, 1, 2);
  if (need_w_down && transposed_down) grad_w_down = torch::stable::transpose(grad_w_down, 1, 2);
  if (need_b_up) grad_b_up = grouped_row_sum(pre, tokens.plan.offsets, stream);
  if (need_b_down) {
    grad_b_down = grouped_weighted_sum(gy, tokens.topk_weights, tokens.row_to_pair,
                                       tokens.plan.offsets, stream);
  }
  return {grad_w_up, grad_w_down, grad_b_up, grad_b_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("moe_mlp", TORCH_BOX(&moe_mlp));
  m.impl("moe_mlp_backward_data", TORCH_BOX(&moe_mlp_backward_data));
  m.impl("moe_mlp_backward_weights", TORCH_BOX(&moe_mlp_backward_weights));
}

}  // namespace moeops::cuda
