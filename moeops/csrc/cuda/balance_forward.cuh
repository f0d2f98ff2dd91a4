// The launch of topk_route_balance_kernel, whose variants are compiled in files of their own.
#pragma once

#include "balance.h"

namespace moeops::cuda {

template <typename Acc, bool kByLogit>
void launch_balance_forward(const BalanceForward<Acc>& f) {
  MOEOPS_DISPATCH_SLOTS(f.options.num_experts, [&] {
    auto* kernel = &topk_route_balance_kernel<Acc, kSlots, kByLogit>;
    const size_t shared = balance_shared_bytes<Acc>(f.options.num_experts, f.threads / kWarpSize,
                                                    f.options.top_k, f.options.num_groups);
    allow_shared_bytes(kernel, shared);
    kernel<<<f.blocks, f.threads, shared, f.stream>>>(
        f.logits, f.bias, f.uniform, f.temperature, f.num_tokens, f.options, f.weights, f.ids,
        f.partial_sums, f.partial_counts, f.bad_values);
  });
}

}  // namespace moeops::cuda
