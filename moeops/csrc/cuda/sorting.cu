// sort_tokens, count_tokens and limit_capacity on CUDA.
#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "common.h"
#include "kernels/sorting.cuh"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int64_t kMinChunk = 2048;  // pairs per block: fewer would spend the time on histograms
constexpr int64_t kMaxBlocks = 256;  // every block sums the histograms of all blocks
constexpr int kCountThreads = 256;
constexpr int kCountBlocksPerSm = 4;
constexpr int64_t kMaxSharedBins =
    2048;  // more would cost more to clear and to add up than to count

// Runs the lambda body with id_t bound to int32_t or int64_t.
template <typename F>
void dispatch_ids(const Tensor& ids, const F& f) {
  if (ids.scalar_type() == ScalarType::Int) {
    f(int32_t{});
  } else {
    f(int64_t{});
  }
}

// Warps per block: as many as the per-warp histograms leave room for.
int sort_warps(const char* op, int64_t num_experts, int max_shared_bytes) {
  for (int warps = kThreads / kWarpSize; warps >= 1; warps /= 2) {
    if ((2 + warps) * (num_experts + 1) * static_cast<int64_t>(sizeof(int32_t)) <=
        max_shared_bytes) {
      return warps;
    }
  }
  STD_TORCH_CHECK(false, op, ": num_experts must fit a block's shared memory of ", max_shared_bytes,
                  " bytes, got ", num_experts, ". Use fewer experts.");
}

struct Plan {
  Tensor row_to_pair, pair_to_row, offsets;
};

Plan sort(const char* op, const Tensor& ids, int64_t num_experts, int64_t num_rows,
          bool drop_out_of_range, cudaStream_t stream) {
  const int64_t num_pairs = ids.numel();
  Plan plan{empty_on(ids, {num_rows}, ScalarType::Int), empty_on(ids, ids.sizes(), ScalarType::Int),
            empty_on(ids, {num_experts + 1}, ScalarType::Int)};
  const int warps =
      sort_warps(op, num_experts, device_limits(ids.get_device_index()).max_shared_bytes);
  const int threads = warps * kWarpSize;
  const int64_t wanted = std::max(kMinChunk, ceil_div(num_pairs, kMaxBlocks));
  const SortShape shape{num_pairs, ceil_div(wanted, threads) * threads, num_rows,
                        static_cast<int>(num_experts), drop_out_of_range};
  const int num_blocks = static_cast<int>(std::max<int64_t>(1, ceil_div(num_pairs, shape.chunk)));
  Tensor counts = empty_on(ids, {num_blocks, num_experts + 1}, ScalarType::Int);
  DebugCounter bad_values(ids, stream), surplus(ids, stream);
  const size_t count_bytes = (num_experts + 1) * sizeof(int32_t);
  const size_t scatter_bytes = (2 + warps) * count_bytes;
  dispatch_ids(ids, [&](auto id) {
    using Id = decltype(id);
    allow_shared_bytes(sort_count_kernel<Id>, count_bytes);
    allow_shared_bytes(sort_scatter_kernel<Id>, scatter_bytes);
    const auto* data = static_cast<const Id*>(ids.data_ptr());
    auto* count = static_cast<int32_t*>(counts.data_ptr());
    sort_count_kernel<Id><<<num_blocks, threads, count_bytes, stream>>>(
        data, shape, count, bad_values.device_pointer());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    sort_scatter_kernel<Id><<<num_blocks, threads, scatter_bytes, stream>>>(
        data, shape, count, num_blocks, static_cast<int32_t*>(plan.row_to_pair.data_ptr()),
        static_cast<int32_t*>(plan.pair_to_row.data_ptr()),
        static_cast<int32_t*>(plan.offsets.data_ptr()), surplus.device_pointer());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, op, ": topk_ids must be from -1 to ", num_experts - 1, ", got ", bad,
                  " ids outside. Fix the gate, or pass drop_out_of_range=True.");
  const int64_t too_many = surplus.read();
  STD_TORCH_CHECK(too_many == 0, op, ": num_rows must be at least the ", num_rows + too_many,
                  " pairs that are kept, got ", num_rows,
                  ". Raise it, or drop pairs with -1 in topk_ids.");
  return plan;
}

std::tuple<Tensor, Tensor, Tensor> sort_tokens(const Tensor& topk_ids, int64_t num_experts,
                                               std::optional<int64_t> rows_asked,
                                               bool drop_out_of_range) {
  constexpr auto kOp = "sort_tokens";
  check_ids(kOp, topk_ids);
  check_num_experts(kOp, num_experts);
  const int64_t num_rows = plan_rows(kOp, rows_asked, topk_ids.numel());
  DeviceGuard guard(topk_ids.get_device_index());
  Plan plan = sort(kOp, as_contiguous(topk_ids), num_experts, num_rows, drop_out_of_range,
                   current_stream(topk_ids));
  return {plan.row_to_pair, plan.pair_to_row, plan.offsets};
}

Tensor count_tokens(const Tensor& topk_ids, int64_t num_experts) {
  constexpr auto kOp = "count_tokens";
  check_id_type(kOp, topk_ids);
  check_num_experts(kOp, num_experts);
  STD_TORCH_CHECK(num_experts <= std::numeric_limits<int>::max(), kOp,
                  ": num_experts must be below 2^31, got ", num_experts, ". Use fewer experts.");
  DeviceGuard guard(topk_ids.get_device_index());
  const cudaStream_t stream = current_stream(topk_ids);
  const Tensor ids = as_contiguous(topk_ids);
  Tensor counts = empty_on(ids, {num_experts}, ScalarType::Int);
  STD_CUDA_CHECK(cudaMemsetAsync(counts.data_ptr(), 0, num_experts * sizeof(int32_t), stream));
  const int64_t num_ids = ids.numel();
  if (num_ids == 0) return counts;
  constexpr int64_t kStep = kCountThreads * kCountIds;
  const int64_t max_blocks =
      int64_t{kCountBlocksPerSm} * device_limits(ids.get_device_index()).num_sms;
  SortShape shape{};
  shape.num_pairs = num_ids;
  shape.chunk = ceil_div(ceil_div(num_ids, max_blocks), kStep) * kStep;
  shape.num_experts = static_cast<int>(num_experts);
  const auto blocks = static_cast<unsigned>(ceil_div(num_ids, shape.chunk));
  const bool shared = num_experts <= kMaxSharedBins;
  const size_t bytes = shared ? num_experts * sizeof(int32_t) : 0;
  DebugCounter bad_values(ids, stream);
  dispatch_ids(ids, [&](auto id) {
    using Id = decltype(id);
    constexpr int kVector = 16 / sizeof(Id);
    const bool wide = reinterpret_cast<uintptr_t>(ids.data_ptr()) % 16 == 0;
    auto* kernel =
        shared
            ? (wide ? &count_tokens_kernel<Id, kVector, true> : &count_tokens_kernel<Id, 1, true>)
            : (wide ? &count_tokens_kernel<Id, kVector, false>
                    : &count_tokens_kernel<Id, 1, false>);
    kernel<<<blocks, kCountThreads, bytes, stream>>>(static_cast<const Id*>(ids.data_ptr()), shape,
                                                     static_cast<int32_t*>(counts.data_ptr()),
                                                     bad_values.device_pointer());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, kOp, ": topk_ids must be from -1 to ", num_experts - 1, ", got ", bad,
                  " ids outside. Fix the gate.");
  return counts;
}

Tensor limit_capacity(const Tensor& topk_ids, const std::optional<Tensor>& priority,
                      int64_t num_experts, int64_t capacity) {
  constexpr auto kOp = "limit_capacity";
  check_ids(kOp, topk_ids);
  check_num_experts(kOp, num_experts);
  STD_TORCH_CHECK(capacity >= 0, kOp, ": capacity must be at least 0, got ", capacity,
                  ". Pass rows per expert.");
  DeviceGuard guard(topk_ids.get_device_index());
  const cudaStream_t stream = current_stream(topk_ids);
  const Tensor ids = as_contiguous(topk_ids);
  const int64_t num_pairs = ids.numel();
  Tensor out = empty_on(ids, ids.sizes(), ids.scalar_type());
  if (num_pairs == 0) return out;
  Tensor sorted_ids = ids, order;
  if (priority) {
    check_dim(kOp, "priority", *priority, 2);
    check_float(kOp, "priority", *priority);
    check_size(kOp, "priority", *priority, 0, ids.size(0));
    check_size(kOp, "priority", *priority, 1, ids.size(1));
    check_same_device(kOp, "priority", *priority, ids);
    order = argsort_descending(torch::stable::reshape(*priority, {num_pairs}));
    sorted_ids = empty_on(ids, ids.sizes(), ids.scalar_type());
  }
  const unsigned blocks = grid_blocks(num_pairs, kThreads);
  const int64_t* picked = priority ? static_cast<const int64_t*>(order.data_ptr()) : nullptr;
  dispatch_ids(ids, [&](auto id) {
    using Id = decltype(id);
    const auto* data = static_cast<const Id*>(ids.data_ptr());
    if (priority) {
      gather_ids_kernel<Id><<<blocks, kThreads, 0, stream>>>(
          data, picked, num_pairs, static_cast<Id*>(sorted_ids.data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const Plan plan =
        sort(kOp, sorted_ids, num_experts, num_pairs, /*drop_out_of_range=*/false, stream);
    limit_capacity_kernel<Id><<<blocks, kThreads, 0, stream>>>(
        data, picked, static_cast<const int32_t*>(plan.pair_to_row.data_ptr()),
        static_cast<const int32_t*>(plan.offsets.data_ptr()), num_pairs,
        static_cast<int>(num_experts), capacity, static_cast<Id*>(out.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("sort_tokens", TORCH_BOX(&sort_tokens));
  m.impl("count_tokens", TORCH_BOX(&count_tokens));
  m.impl("limit_capacity", TORCH_BOX(&limit_capacity));
}

}  // namespace moeops::cuda
