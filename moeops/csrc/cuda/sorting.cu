// sort_tokens, count_tokens and limit_capacity on CUDA.
#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "common.h"
#include "kernels/sorting.cuh"

namespace moeops::cuda {

namespace {

// How the pairs are cut into chunks, one for each block. A sort's blocks sum the histograms of all
// blocks, and chunks of fewer pairs would spend the time on that; those of a limit read the earlier
// ones only, and are over the sooner the fewer pairs a warp has.
struct Cut {
  int threads;
  int64_t min_chunk;
  int64_t max_blocks;
  int rows;  // histograms in shared memory beside those of the warps
};
constexpr Cut kSortCut{512, 2048, 256, 2};
constexpr Cut kLimitCut{1024, 1024, 128, 1};
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
int sort_warps(const char* op, int64_t num_experts, const Cut& cut, int max_shared_bytes) {
  for (int warps = cut.threads / kWarpSize; warps >= 1; warps /= 2) {
    if ((cut.rows + warps) * (num_experts + 1) * static_cast<int64_t>(sizeof(int32_t)) <=
        max_shared_bytes) {
      return warps;
    }
  }
  STD_TORCH_CHECK(false, op, ": num_experts must fit a block's shared memory of ", max_shared_bytes,
                  " bytes, got ", num_experts, ". Use fewer experts.");
}

// What both passes of a sort share.
struct SortLaunch {
  SortShape shape;
  int blocks, threads;
  size_t count_bytes, scatter_bytes;
  Tensor counts;  // [blocks, E + 1]
};

// The first pass: counts per block and expert.
SortLaunch count_blocks(const char* op, const Tensor& ids, int64_t num_experts, int64_t num_rows,
                        bool drop_out_of_range, const Cut& cut, const Queue& queue,
                        cudaStream_t stream) {
  const int64_t num_pairs = ids.numel();
  const int warps =
      sort_warps(op, num_experts, cut, device_limits(ids.get_device_index()).max_shared_bytes);
  const int threads = warps * kWarpSize;
  const int64_t wanted = std::max(cut.min_chunk, ceil_div(num_pairs, cut.max_blocks));
  const SortShape shape{num_pairs, ceil_div(wanted, threads) * threads, num_rows,
                        static_cast<int>(num_experts), drop_out_of_range};
  const int blocks = static_cast<int>(std::max<int64_t>(1, ceil_div(num_pairs, shape.chunk)));
  const size_t count_bytes = (num_experts + 1) * sizeof(int32_t);
  SortLaunch launch{shape,
                    blocks,
                    threads,
                    count_bytes,
                    (cut.rows + warps) * count_bytes,
                    empty_on(ids, {blocks, num_experts + 1}, ScalarType::Int)};
  DebugCounter bad_values(ids, stream);
  dispatch_ids(ids, [&](auto id) {
    using Id = decltype(id);
    allow_shared_bytes(sort_count_kernel<Id>, count_bytes);
    sort_count_kernel<Id><<<blocks, threads, count_bytes, stream>>>(
        static_cast<const Id*>(ids.data_ptr()), shape, queue,
        static_cast<int32_t*>(launch.counts.data_ptr()), bad_values.device_pointer());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, op, ": topk_ids must be from -1 to ", num_experts - 1, ", got ", bad,
                  " ids outside. Fix the gate, or pass drop_out_of_range=True.");
  return launch;
}

std::tuple<Tensor, Tensor, Tensor> sort_tokens(const Tensor& topk_ids, int64_t num_experts,
                                               std::optional<int64_t> rows_asked,
                                               bool drop_out_of_range) {
  constexpr auto kOp = "sort_tokens";
  check_ids(kOp, topk_ids);
  check_num_experts(kOp, num_experts);
  const int64_t num_rows = plan_rows(kOp, rows_asked, topk_ids.numel());
  DeviceGuard guard(topk_ids.get_device_index());
  const Tensor ids = as_contiguous(topk_ids);
  const cudaStream_t stream = current_stream(ids);
  Tensor row_to_pair = empty_on(ids, {num_rows}, ScalarType::Int);
  Tensor pair_to_row = empty_on(ids, ids.sizes(), ScalarType::Int);
  Tensor offsets = empty_on(ids, {num_experts + 1}, ScalarType::Int);
  const SortLaunch launch =
      count_blocks(kOp, ids, num_experts, num_rows, drop_out_of_range, kSortCut, Queue{}, stream);
  DebugCounter surplus(ids, stream);
  dispatch_ids(ids, [&](auto id) {
    using Id = decltype(id);
    auto* kernel = &sort_scatter_kernel<Id>;
    allow_shared_bytes(kernel, launch.scatter_bytes);
    kernel<<<launch.blocks, launch.threads, launch.scatter_bytes, stream>>>(
        static_cast<const Id*>(ids.data_ptr()), launch.shape,
        static_cast<const int32_t*>(launch.counts.data_ptr()), launch.blocks,
        static_cast<int32_t*>(row_to_pair.data_ptr()),
        static_cast<int32_t*>(pair_to_row.data_ptr()), static_cast<int32_t*>(offsets.data_ptr()),
        surplus.device_pointer());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const int64_t too_many = surplus.read();
  STD_TORCH_CHECK(too_many == 0, kOp, ": num_rows must be at least the ", num_rows + too_many,
                  " pairs that are kept, got ", num_rows,
                  ". Raise it, or drop pairs with -1 in topk_ids.");
  return {row_to_pair, pair_to_row, offsets};
}

Tensor count_tokens(const Tensor& topk_ids, int64_t num_experts) {
  constexpr auto kOp = "count_tokens";
  check_id_type(kOp, topk_ids);
  check_num_experts(kOp, num_experts);
  STD_TORCH_CHECK(num_experts <= std::numeric_limits<int>::max(), kOp,
                  ": num_experts must be below 2^31, got ", num_experts, ". Use fewer experts.");
  DeviceGuard guard(topk_ids.get_device_index());
  const cudaStream_t stream = current_stream(topk_ids);
  // A column, as losses of first choices count, is read in place.
  const bool column = topk_ids.dim() == 2 && topk_ids.size(1) == 1;
  const Tensor ids = column ? topk_ids : as_contiguous(topk_ids);
  const int64_t stride = column ? topk_ids.stride(0) : 1;
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
    const bool wide = stride == 1 && reinterpret_cast<uintptr_t>(ids.data_ptr()) % 16 == 0;
    auto* kernel =
        shared
            ? (wide ? &count_tokens_kernel<Id, kVector, true> : &count_tokens_kernel<Id, 1, true>)
            : (wide ? &count_tokens_kernel<Id, kVector, false>
                    : &count_tokens_kernel<Id, 1, false>);
    kernel<<<blocks, kCountThreads, bytes, stream>>>(
        static_cast<const Id*>(ids.data_ptr()), stride, shape,
        static_cast<int32_t*>(counts.data_ptr()), bad_values.device_pointer());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const int32_t bad = bad_values.read();
  STD_TORCH_CHECK(bad == 0, kOp, ": topk_ids must be from -1 to ", num_experts - 1, ", got ", bad,
                  " ids outside. Fix the gate.");
  return counts;
}

Tensor limit_capacity(const Tensor& topk_ids, int64_t num_experts, int64_t capacity,
                      const std::optional<Tensor>& priority, bool by_choice) {
  constexpr auto kOp = "limit_capacity";
  check_limit(kOp, topk_ids, priority, num_experts, capacity, by_choice);
  DeviceGuard guard(topk_ids.get_device_index());
  const cudaStream_t stream = current_stream(topk_ids);
  const Tensor ids = as_contiguous(topk_ids);
  const int64_t num_pairs = ids.numel();
  Tensor out = empty_on(ids, ids.sizes(), ids.scalar_type());
  if (num_pairs == 0) return out;
  Tensor order;
  Queue queue{};
  if (priority) {
    order = argsort_descending(torch::stable::reshape(*priority, {num_pairs}));
    queue.order = static_cast<const int64_t*>(order.data_ptr());
  } else if (by_choice && ids.size(1) > 1) {
    queue.num_tokens = static_cast<uint32_t>(ids.size(0));
    queue.top_k = static_cast<uint32_t>(ids.size(1));
  }
  const SortLaunch launch = count_blocks(kOp, ids, num_experts, num_pairs,
                                         /*drop_out_of_range=*/false, kLimitCut, queue, stream);
  dispatch_ids(ids, [&](auto id) {
    using Id = decltype(id);
    auto* kernel = &limit_kernel<Id>;
    allow_shared_bytes(kernel, launch.scatter_bytes);
    kernel<<<launch.blocks, launch.threads, launch.scatter_bytes, stream>>>(
        static_cast<const Id*>(ids.data_ptr()), launch.shape, queue,
        static_cast<const int32_t*>(launch.counts.data_ptr()), capacity,
        static_cast<Id*>(out.data_ptr()));
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
