// topk_route_balance, prototype_route, relu_route and their backwards on CUDA.
#include <torch/csrc/stable/library.h>

#include "common.h"
#include "device_dispatch.h"
#include "kernels/balance.cuh"
#include "kernels/prototype.cuh"
#include "kernels/relu.cuh"

namespace moeops::cuda {

namespace {

// One row of partial sums for 1024 threads: enough warps to keep a multiprocessor busy, and few
// rows to add up.
constexpr int64_t kThreadsPerSm = 1024;
constexpr int kBackwardThreads = 256;
constexpr int64_t kBackwardBlocksPerSm = 8;

// A tensor of the op's optional arguments as the kernels read it, in the accumulate type.
template <typename Acc>
const Acc* pointer_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<const Acc*>(t->data_ptr()) : nullptr;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(as_contiguous(*t)) : t;
}

Tensor in_type_of(const Tensor& logits, const Tensor& grad) {
  if (grad.scalar_type() == logits.scalar_type()) return grad;
  return torch::stable::to(grad, logits.scalar_type());
}

unsigned backward_blocks(const Tensor& logits) {
  const int64_t most = kBackwardBlocksPerSm * device_limits(logits.get_device_index()).num_sms;
  return static_cast<unsigned>(
      std::min(ceil_div(logits.size(0), kBackwardThreads / kWarpSize), most));
}

void refuse_bad_logits(const char* op, DebugCounter& bad_values) {
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, op, ": logits must be finite, got NaN or infinity in ", bad,
                  " places. Look at the router's input and weights.");
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The outputs of a route with K slots: weights, sums, loss, ids and counts; of no tokens all sums
// are 0. With tokens launch(kSlots, blocks, threads, partial_sums, partial_counts) runs the route,
// whose partial sums are added up here.
template <typename Acc, typename Launch>
Outputs add_up_route(const Tensor& logits, int64_t top_k, cudaStream_t stream,
                     const Launch& launch) {
  const ScalarType acc = accumulate_type(logits.scalar_type());
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  Tensor weights = empty_on(logits, {num_tokens, top_k}, acc);
  Tensor ids = empty_on(logits, {num_tokens, top_k}, ScalarType::Long);
  if (num_tokens == 0) {
    return {weights, torch::stable::new_zeros(logits, {num_experts}, acc),
            torch::stable::new_zeros(logits, {}, acc), ids,
            torch::stable::new_zeros(logits, {num_experts}, ScalarType::Int)};
  }
  Tensor sums = empty_on(logits, {num_experts}, acc);
  Tensor loss = empty_on(logits, {}, acc);
  Tensor counts = empty_on(logits, {num_experts}, ScalarType::Int);
  MOEOPS_DISPATCH_SLOTS(num_experts, [&] {
    constexpr int kThreads = balance_threads(kSlots), kWarps = kThreads / kWarpSize;
    const int64_t most = device_limits(logits.get_device_index()).num_sms *
                         std::max<int64_t>(1, kSlots <= 8 ? kThreadsPerSm / kThreads : 1);
    const auto blocks = static_cast<int>(std::min(ceil_div(num_tokens, kWarps), most));
    Tensor partial_sums = empty_on(logits, {blocks, num_experts}, acc);
    // One row more, for the ticket.
    Tensor partial_counts = empty_on(logits, {blocks + 1, num_experts}, ScalarType::Int);
    auto* rows_of_counts = static_cast<int32_t*>(partial_counts.data_ptr());
    launch(std::integral_constant<int, kSlots>{}, blocks, kThreads,
           static_cast<Acc*>(weights.data_ptr()), static_cast<int64_t*>(ids.data_ptr()),
           static_cast<Acc*>(partial_sums.data_ptr()), rows_of_counts);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    add_up_balance_kernel<Acc><<<ceil_div(num_experts, kWarpSize), 1024, 0, stream>>>(
        static_cast<const Acc*>(partial_sums.data_ptr()), rows_of_counts, blocks,
        static_cast<int>(num_experts), num_tokens, rows_of_counts + blocks * num_experts,
        static_cast<Acc*>(sums.data_ptr()), static_cast<int32_t*>(counts.data_ptr()),
        static_cast<Acc*>(loss.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {weights, sums, loss, ids, counts};
}

Outputs topk_route_balance(const Tensor& logits, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& uniform,
                           const std::optional<Tensor>& temperature, int64_t top_k,
                           const std::string& score, bool renormalize, double scale,
                           int64_t num_groups, int64_t top_groups, bool groups_by_sum, double top_p,
                           double min_score, int64_t num_counted) {
  constexpr auto kOp = "topk_route_balance";
  check_balance_arguments(kOp, logits, bias, uniform, temperature, top_k, score, num_groups,
                          top_groups, num_counted);
  check_register_experts(kOp, logits.size(1));
  const BalanceOptions options{
      {static_cast<int>(logits.size(1)), static_cast<int>(top_k), static_cast<int>(num_groups),
       static_cast<int>(top_groups), score == "sigmoid", renormalize, scale},
      groups_by_sum,
      top_p,
      min_score,
      static_cast<int>(num_counted)};
  DeviceGuard guard(logits.get_device_index());
  const ScalarType acc = accumulate_type(logits.scalar_type());
  const auto prepared = [&](const std::optional<Tensor>& t) {
    return t && t->scalar_type() != acc ? dense(torch::stable::to(*t, acc)) : dense(t);
  };
  const std::optional<Tensor> shift = prepared(bias), draws = prepared(uniform),
                              divisor = prepared(temperature);
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_accumulate(logits);
  const bool one_group = groups_by_sum && top_groups == 1 && score == "softmax";
  const bool by_logit = !bias && (num_groups == 1 || one_group);
  Outputs outputs;
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    outputs = add_up_route<Acc>(
        z, top_k, stream,
        [&](auto slots, int blocks, int threads, Acc* weights, int64_t* ids, Acc* partial_sums,
            int32_t* partial_counts) {
          constexpr int kSlots = decltype(slots)::value;
          auto* kernel = by_logit ? &topk_route_balance_kernel<scalar_t, kSlots, true>
                                  : &topk_route_balance_kernel<scalar_t, kSlots, false>;
          const size_t shared =
              balance_shared_bytes<Acc>(options.route.num_experts, threads / kWarpSize,
                                        options.route.top_k, options.route.num_groups);
          allow_shared_bytes(kernel, shared);
          kernel<<<blocks, threads, shared, stream>>>(
              static_cast<const scalar_t*>(z.data_ptr()), pointer_or_null<Acc>(shift),
              pointer_or_null<Acc>(draws), pointer_or_null<Acc>(divisor), z.size(0), options,
              weights, ids, partial_sums, partial_counts, bad_values.device_pointer());
        });
  });
  refuse_bad_logits(kOp, bad_values);
  return outputs;
}

Tensor topk_route_balance_backward(const std::optional<Tensor>& grad_topk_weights,
                                   const std::optional<Tensor>& grad_sums,
                                   const std::optional<Tensor>& grad_loss, const Tensor& logits,
                                   const std::optional<Tensor>& temperature, const Tensor& topk_ids,
                                   const Tensor& tokens_per_expert, const std::string& score,
                                   bool renormalize, double scale) {
  constexpr auto kOp = "topk_route_balance_backward";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, topk_ids.size(1),
                      tokens_per_expert);
  check_score(kOp, score);
  check_temperature(kOp, temperature, logits);
  check_register_experts(kOp, logits.size(1));
  const RouteOptions options{static_cast<int>(logits.size(1)),
                             static_cast<int>(topk_ids.size(1)),
                             /*num_groups=*/1,
                             /*top_groups=*/1,
                             score == "sigmoid",
                             renormalize,
                             scale};
  DeviceGuard guard(logits.get_device_index());
  const ScalarType acc = accumulate_type(logits.scalar_type());
  Tensor grad_logits = empty_on(logits, logits.sizes(), accumulate_type(logits.scalar_type()));
  if (logits.size(0) == 0) return in_type_of(logits, grad_logits);
  const std::optional<Tensor> grad_weights = dense(grad_topk_weights),
                              grad_shares = dense(grad_sums);
  std::optional<Tensor> divisor = temperature;
  if (divisor && divisor->scalar_type() != acc) divisor = torch::stable::to(*divisor, acc);
  const Tensor z = as_accumulate(logits), ids = as_contiguous(topk_ids),
               counts = as_contiguous(tokens_per_expert);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(options.num_experts, [&] {
      auto* kernel = options.sigmoid ? &topk_route_balance_backward_kernel<scalar_t, kSlots, true>
                                     : &topk_route_balance_backward_kernel<scalar_t, kSlots, false>;
      kernel<<<backward_blocks(z), kBackwardThreads, 0, current_stream(logits)>>>(
          pointer_or_null<Acc>(grad_weights), pointer_or_null<Acc>(grad_shares),
          pointer_or_null<Acc>(grad_loss), static_cast<const scalar_t*>(z.data_ptr()),
          pointer_or_null<Acc>(divisor), static_cast<const int64_t*>(ids.data_ptr()),
          static_cast<const int32_t*>(counts.data_ptr()), z.size(0), options,
          static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return in_type_of(logits, grad_logits);
}

Outputs prototype_route(const Tensor& logits, int64_t num_prototypes) {
  constexpr auto kOp = "prototype_route";
  check_prototypes(kOp, logits, num_prototypes);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_accumulate(logits);
  const int num_experts = static_cast<int>(z.size(1)), groups = static_cast<int>(num_prototypes);
  Outputs outputs;
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    outputs = add_up_route<Acc>(
        z, num_prototypes, stream,
        [&](auto slots, int blocks, int threads, Acc* weights, int64_t* ids, Acc* partial_sums,
            int32_t* partial_counts) {
          auto* kernel = &prototype_route_kernel<scalar_t, decltype(slots)::value>;
          kernel<<<blocks, threads, balance_shared_bytes<Acc>(num_experts, 0, 0, 0), stream>>>(
              static_cast<const scalar_t*>(z.data_ptr()), z.size(0), num_experts, groups, weights,
              ids, partial_sums, partial_counts, bad_values.device_pointer());
        });
  });
  refuse_bad_logits(kOp, bad_values);
  return outputs;
}

Tensor prototype_route_backward(const std::optional<Tensor>& grad_topk_weights,
                                const std::optional<Tensor>& grad_sums,
                                const std::optional<Tensor>& grad_loss, const Tensor& logits,
                                const Tensor& topk_ids, const Tensor& tokens_per_expert) {
  constexpr auto kOp = "prototype_route_backward";
  check_ids_of_logits(kOp, logits, topk_ids);
  check_prototypes(kOp, logits, topk_ids.size(1));
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, topk_ids.size(1),
                      tokens_per_expert);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  Tensor grad_logits = empty_on(logits, logits.sizes(), accumulate_type(logits.scalar_type()));
  if (logits.size(0) == 0) return in_type_of(logits, grad_logits);
  const std::optional<Tensor> grad_weights = dense(grad_topk_weights),
                              grad_shares = dense(grad_sums);
  const Tensor z = as_accumulate(logits), ids = as_contiguous(topk_ids),
               counts = as_contiguous(tokens_per_expert);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(z.size(1), [&] {
      prototype_route_backward_kernel<scalar_t, kSlots>
          <<<backward_blocks(z), kBackwardThreads, 0, current_stream(logits)>>>(
              pointer_or_null<Acc>(grad_weights), pointer_or_null<Acc>(grad_shares),
              pointer_or_null<Acc>(grad_loss), static_cast<const scalar_t*>(z.data_ptr()),
              static_cast<const int64_t*>(ids.data_ptr()),
              static_cast<const int32_t*>(counts.data_ptr()), z.size(0),
              static_cast<int>(z.size(1)), static_cast<int>(ids.size(1)),
              static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return in_type_of(logits, grad_logits);
}

Outputs relu_route(const Tensor& logits) {
  constexpr auto kOp = "relu_route";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits);
  DebugCounter bad_values(logits, stream);
  const Tensor z = as_accumulate(logits);
  const int num_experts = static_cast<int>(z.size(1));
  Outputs outputs;
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    outputs = add_up_route<Acc>(
        z, num_experts, stream,
        [&](auto slots, int blocks, int threads, Acc* weights, int64_t* ids, Acc* partial_sums,
            int32_t* partial_counts) {
          auto* kernel = &relu_route_kernel<scalar_t, decltype(slots)::value>;
          kernel<<<blocks, threads, balance_shared_bytes<Acc>(num_experts, 0, 0, 0), stream>>>(
              static_cast<const scalar_t*>(z.data_ptr()), z.size(0), num_experts, weights, ids,
              partial_sums, partial_counts, bad_values.device_pointer());
        });
  });
  refuse_bad_logits(kOp, bad_values);
  return outputs;
}

Tensor relu_route_backward(const std::optional<Tensor>& grad_topk_weights,
                           const std::optional<Tensor>& grad_sums,
                           const std::optional<Tensor>& grad_loss, const Tensor& logits,
                           const Tensor& tokens_per_expert) {
  constexpr auto kOp = "relu_route_backward";
  check_dim(kOp, "logits", logits, 2);
  check_float(kOp, "logits", logits);
  check_balance_grads(kOp, grad_topk_weights, grad_sums, grad_loss, logits, logits.size(1),
                      tokens_per_expert);
  check_register_experts(kOp, logits.size(1));
  DeviceGuard guard(logits.get_device_index());
  Tensor grad_logits = empty_on(logits, logits.sizes(), accumulate_type(logits.scalar_type()));
  if (logits.size(0) == 0) return in_type_of(logits, grad_logits);
  const std::optional<Tensor> grad_weights = dense(grad_topk_weights),
                              grad_shares = dense(grad_sums);
  const Tensor z = as_accumulate(logits), counts = as_contiguous(tokens_per_expert);
  MOEOPS_DISPATCH_ACCUMULATE(z.scalar_type(), [&] {
    using Acc = scalar_t;
    MOEOPS_DISPATCH_SLOTS(z.size(1), [&] {
      relu_route_backward_kernel<scalar_t, kSlots>
          <<<backward_blocks(z), kBackwardThreads, 0, current_stream(logits)>>>(
              pointer_or_null<Acc>(grad_weights), pointer_or_null<Acc>(grad_shares),
              pointer_or_null<Acc>(grad_loss), static_cast<const scalar_t*>(z.data_ptr()),
              static_cast<const int32_t*>(counts.data_ptr()), z.size(0),
              static_cast<int>(z.size(1)), static_cast<scalar_t*>(grad_logits.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return in_type_of(logits, grad_logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("topk_route_balance", TORCH_BOX(&topk_route_balance));
  m.impl("topk_route_balance_backward", TORCH_BOX(&topk_route_balance_backward));
  m.impl("prototype_route", TORCH_BOX(&prototype_route));
  m.impl("prototype_route_backward", TORCH_BOX(&prototype_route_backward));
  m.impl("relu_route", TORCH_BOX(&relu_route));
  m.impl("relu_route_backward", TORCH_BOX(&relu_route_backward));
}

}  // namespace moeops::cuda
