// permute_tokens, unpermute_tokens and unpermute_tokens_backward on CUDA.
#include <torch/csrc/stable/library.h>

#include "device_dispatch.h"
#include "kernels/permute.cuh"
#include "permute.h"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;

bool is_aligned(const Tensor& t, int64_t row_bytes) {
  return row_bytes % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(t.data_ptr()) % kVectorBytes == 0;
}

// Threads along a row of `words`, and rows per block: whole warps on a row, long rows in equal
// passes with few idle threads, short rows side by side in a block.
dim3 row_block(int64_t words) {
  const int64_t passes = std::max<int64_t>(1, ceil_div(words, kThreads));
  const int64_t along = ceil_div(std::max<int64_t>(1, ceil_div(words, passes)), kWarpSize);
  const int x = static_cast<int>(along * kWarpSize);
  return dim3(x, kThreads / x);
}

// Fewer rows than pairs: some pairs are dead for sure, and most may be.
bool is_sparse(const Tensor& rows, const Tensor& pair_to_row) {
  return rows.size(0) < pair_to_row.numel();
}

template <typename Word>
void launch_permute(const Tensor& x, const Tensor& pair_to_row, const Tensor& offsets, Tensor& rows,
                    int64_t words, cudaStream_t stream) {
  const dim3 block = row_block(words);
  const int64_t num_tokens = pair_to_row.size(0), top_k = pair_to_row.size(1);
  // Rows without a pair are zeroed by the same groups, about top_k by each.
  const int64_t groups = std::max(num_tokens, rows.size(0) / std::max<int64_t>(1, top_k));
  auto* kernel =
      is_sparse(rows, pair_to_row) ? &permute_kernel<Word, true> : &permute_kernel<Word, false>;
  kernel<<<grid_blocks(groups, block.y), block, 0, stream>>>(
      static_cast<const Word*>(x.data_ptr()), static_cast<const int32_t*>(pair_to_row.data_ptr()),
      static_cast<const int32_t*>(offsets.data_ptr()), static_cast<int>(offsets.size(0) - 1),
      num_tokens, static_cast<int>(top_k), rows.size(0), words,
      static_cast<Word*>(rows.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, int kElements, int kRows, bool kSparse>
void launch_unpermute(const Tensor& rows, const std::optional<Tensor>& topk_weights,
                      const Tensor& pair_to_row, const Tensor& offsets, Tensor& y,
                      cudaStream_t stream) {
  using Acc = device_accumulate_t<T>;
  const int64_t width = rows.size(1);
  constexpr int kColumns = kUnpermuteLoads / kRows;
  const dim3 block = row_block(ceil_div(width, kElements * kColumns));
  const int64_t num_tokens = pair_to_row.size(0);
  auto* kernel = &unpermute_kernel<T, kElements, kRows, kSparse>;
  kernel<<<grid_blocks(num_tokens, block.y), block, 0, stream>>>(
      static_cast<const T*>(rows.data_ptr()),
      topk_weights ? static_cast<const Acc*>(topk_weights->data_ptr()) : nullptr,
      static_cast<const int32_t*>(pair_to_row.data_ptr()),
      static_cast<const int32_t*>(offsets.data_ptr()), static_cast<int>(offsets.size(0) - 1),
      num_tokens, static_cast<int>(pair_to_row.size(1)), rows.size(0), width,
      static_cast<T*>(y.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// As many rows at a time as a token has, so that none of the loads in flight is idle. How many of
// its slots are live is not known here: two rows and two columns at a time suit one as well as
// four.
template <typename T, int kElements>
void launch_unpermute_for_k(const Tensor& rows, const std::optional<Tensor>& topk_weights,
                            const Tensor& pair_to_row, const Tensor& offsets, Tensor& y,
                            cudaStream_t stream) {
  const int64_t top_k = pair_to_row.size(1);
  auto* launch = is_sparse(rows, pair_to_row) ? &launch_unpermute<T, kElements, 2, true>
                 : top_k == 1                 ? &launch_unpermute<T, kElements, 1, false>
                 : top_k == 2                 ? &launch_unpermute<T, kElements, 2, false>
                                              : &launch_unpermute<T, kElements, 4, false>;
  launch(rows, topk_weights, pair_to_row, offsets, y, stream);
}

}  // namespace

void permute(const Tensor& x, const Tensor& pair_to_row, const Tensor& offsets, Tensor& rows,
             cudaStream_t stream) {
  if (rows.numel() == 0) return;
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  if (is_aligned(x, row_bytes) && is_aligned(rows, row_bytes)) {
    return launch_permute<uint4>(x, pair_to_row, offsets, rows, row_bytes / kVectorBytes, stream);
  }
  switch (x.element_size()) {
    case 2:
      return launch_permute<uint16_t>(x, pair_to_row, offsets, rows, x.size(1), stream);
    case 4:
      return launch_permute<uint32_t>(x, pair_to_row, offsets, rows, x.size(1), stream);
    default:
      return launch_permute<uint64_t>(x, pair_to_row, offsets, rows, x.size(1), stream);
  }
}

void unpermute(const Tensor& rows, const std::optional<Tensor>& topk_weights,
               const Tensor& pair_to_row, const Tensor& offsets, Tensor& y, cudaStream_t stream) {
  if (y.numel() == 0) return;
  const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  const bool aligned = is_aligned(rows, row_bytes) && is_aligned(y, row_bytes);
  MOEOPS_DISPATCH_DEVICE_FLOAT(rows.scalar_type(), "unpermute_tokens", [&] {
    constexpr int kElements = kVectorBytes / sizeof(scalar_t);
    auto* launch = aligned ? &launch_unpermute_for_k<scalar_t, kElements>
                           : &launch_unpermute_for_k<scalar_t, 1>;
    launch(rows, topk_weights, pair_to_row, offsets, y, stream);
  });
}

namespace {

Tensor permute_tokens(const Tensor& x, const Tensor& row_to_pair, const Tensor& pair_to_row,
                      const Tensor& expert_offsets) {
  constexpr auto kOp = "permute_tokens";
  check_dim(kOp, "x", x, 2);
  check_float(kOp, "x", x);
  check_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  check_size(kOp, "x", x, 0, pair_to_row.size(0));
  DeviceGuard guard(x.get_device_index());
  Tensor rows = empty_on(x, {row_to_pair.size(0), x.size(1)}, x.scalar_type());
  permute(as_contiguous(x), as_contiguous(pair_to_row), as_contiguous(expert_offsets), rows,
          current_stream(x));
  return rows;
}

void check_topk_weights(const char* op, const Tensor& topk_weights, const Tensor& pair_to_row,
                        const Tensor& rows) {
  check_dim(op, "topk_weights", topk_weights, 2);
  check_type(op, "topk_weights", topk_weights, accumulate_type(rows.scalar_type()),
             "float32 (float64 for float64 rows)");
  check_size(op, "topk_weights", topk_weights, 0, pair_to_row.size(0));
  check_size(op, "topk_weights", topk_weights, 1, pair_to_row.size(1));
  check_same_device(op, "topk_weights", topk_weights, rows);
}

Tensor unpermute_tokens(const Tensor& rows, const Tensor& row_to_pair, const Tensor& pair_to_row,
                        const Tensor& expert_offsets, const std::optional<Tensor>& topk_weights) {
  constexpr auto kOp = "unpermute_tokens";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  check_plan(kOp, row_to_pair, pair_to_row, expert_offsets, rows);
  check_size(kOp, "rows", rows, 0, row_to_pair.size(0));
  std::optional<Tensor> weights;
  if (topk_weights) {
    check_topk_weights(kOp, *topk_weights, pair_to_row, rows);
    weights = as_contiguous(*topk_weights);
  }
  DeviceGuard guard(rows.get_device_index());
  Tensor y = empty_on(rows, {pair_to_row.size(0), rows.size(1)}, rows.scalar_type());
  unpermute(as_contiguous(rows), weights, as_contiguous(pair_to_row), as_contiguous(expert_offsets),
            y, current_stream(rows));
  return y;
}

template <typename T, int kElements>
void launch_unpermute_backward(const Tensor& grad_y, const Tensor& rows, const Tensor& topk_weights,
                               const Tensor& pair_to_row, const Tensor& offsets, Tensor& grad_rows,
                               Tensor& grad_topk_weights, cudaStream_t stream) {
  using Acc = device_accumulate_t<T>;
  const int64_t num_rows = rows.size(0), num_pairs = pair_to_row.numel();
  // As many pairs to a warp as share one row.
  const int span = static_cast<int>(
      std::clamp<int64_t>(num_pairs / std::max<int64_t>(1, num_rows), 1, kWarpSize));
  const int64_t warps = std::max(ceil_div(num_pairs, span), num_rows / kWarpSize);
  auto* kernel = is_sparse(rows, pair_to_row) ? &unpermute_backward_kernel<T, kElements, true>
                                              : &unpermute_backward_kernel<T, kElements, false>;
  kernel<<<grid_blocks(warps, kThreads / kWarpSize), kThreads, 0, stream>>>(
      static_cast<const T*>(grad_y.data_ptr()), static_cast<const T*>(rows.data_ptr()),
      static_cast<const Acc*>(topk_weights.data_ptr()),
      static_cast<const int32_t*>(pair_to_row.data_ptr()),
      static_cast<const int32_t*>(offsets.data_ptr()), static_cast<int>(offsets.size(0) - 1),
      num_pairs, static_cast<int>(pair_to_row.size(1)), span, num_rows, rows.size(1),
      static_cast<T*>(grad_rows.data_ptr()), static_cast<Acc*>(grad_topk_weights.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> unpermute_tokens_backward(const Tensor& grad_y, const Tensor& rows,
                                                     const Tensor& row_to_pair,
                                                     const Tensor& pair_to_row,
                                                     const Tensor& expert_offsets,
                                                     const Tensor& topk_weights) {
  constexpr auto kOp = "unpermute_tokens_backward";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  check_plan(kOp, row_to_pair, pair_to_row, expert_offsets, rows);
  check_size(kOp, "rows", rows, 0, row_to_pair.size(0));
  check_topk_weights(kOp, topk_weights, pair_to_row, rows);
  check_dim(kOp, "grad_y", grad_y, 2);
  check_size(kOp, "grad_y", grad_y, 0, pair_to_row.size(0));
  check_size(kOp, "grad_y", grad_y, 1, rows.size(1));
  check_type(kOp, "grad_y", grad_y, rows.scalar_type(), "the type of rows");
  check_same_device(kOp, "grad_y", grad_y, rows);
  DeviceGuard guard(rows.get_device_index());
  Tensor grad_rows = empty_on(rows, rows.sizes(), rows.scalar_type());
  Tensor grad_topk_weights =
      empty_on(topk_weights, topk_weights.sizes(), topk_weights.scalar_type());
  if (topk_weights.numel() == 0 && rows.numel() == 0) return {grad_rows, grad_topk_weights};
  const Tensor g = as_contiguous(grad_y), r = as_contiguous(rows);
  const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  const bool aligned =
      is_aligned(g, row_bytes) && is_aligned(r, row_bytes) && is_aligned(grad_rows, row_bytes);
  MOEOPS_DISPATCH_DEVICE_FLOAT(rows.scalar_type(), kOp, [&] {
    constexpr int kElements = kVectorBytes / sizeof(scalar_t);
    auto* launch = aligned ? &launch_unpermute_backward<scalar_t, kElements>
                           : &launch_unpermute_backward<scalar_t, 1>;
    launch(g, r, as_contiguous(topk_weights), as_contiguous(pair_to_row),
           as_contiguous(expert_offsets), grad_rows, grad_topk_weights, current_stream(rows));
  });
  return {grad_rows, grad_topk_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("permute_tokens", TORCH_BOX(&permute_tokens));
  m.impl("unpermute_tokens", TORCH_BOX(&unpermute_tokens));
  m.impl("unpermute_tokens_backward", TORCH_BOX(&unpermute_tokens_backward));
}

}  // namespace moeops::cuda
