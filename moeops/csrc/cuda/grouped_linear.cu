// grouped_linear, grouped_linear_weight_grad and grouped_sum on CUDA.
#include <torch/csrc/stable/library.h>

#include "aten.h"
#include "checks/grouped_linear.h"
#include "device_dispatch.h"
#include "grouped_linear.h"
#include "hopper/hopper.h"
#include "kernels/grouped_gemm.cuh"
#include "kernels/plan_rows.cuh"

namespace moeops::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;
constexpr int kTileDouble = 64;              // 8 x 8 doubles per thread would spill
constexpr int64_t kTensorMapAlignment = 16;  // bytes; strides and addresses of torch's grouped_mm

bool address_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % kTensorMapAlignment == 0;
}

// torch's grouped_mm runs without a host copy for bfloat16 on compute capability 9 and 10, given
// 16-byte strides.
bool torch_grouped_mm_applies(const Tensor& like) {
  const int major = device_limits(like.get_device_index()).capability_major;
  return like.scalar_type() == ScalarType::BFloat16 && (major == 9 || major == 10);
}

bool aligned_elements(int64_t elements) { return elements % (kTensorMapAlignment / 2) == 0; }

// One of the last two strides is 1, the others are whole vectors.
bool aligned_matrices(const Tensor& weight) {
  const int64_t outer = weight.stride(0), row = weight.stride(1), column = weight.stride(2);
  const bool row_major = column == 1 && aligned_elements(row);
  const bool column_major = row == 1 && aligned_elements(column);
  return (row_major || column_major) && aligned_elements(outer) && address_aligned(weight);
}

const int32_t* offsets_data(const Tensor& offsets) {
  return static_cast<const int32_t*>(offsets.data_ptr());
}

template <typename T, bool kAContiguousK, bool kBContiguousK>
void launch_gemm(const Tensor& a, const Tensor& b, Tensor& c, const GroupedGemmShape& shape,
                 int64_t num_rows, cudaStream_t stream) {
  constexpr bool kHalf = sizeof(T) == 2;
  constexpr int tile = std::is_same_v<T, double> ? kTileDouble : kTile;
  // Ragged rows: an upper bound of the number of row tiles, the surplus blocks leave at once.
  const int64_t row_tiles =
      shape.ragged_k ? ceil_div(shape.m, tile) : num_rows / tile + shape.num_experts;
  const dim3 grid(static_cast<unsigned>(row_tiles), static_cast<unsigned>(ceil_div(shape.n, tile)),
                  shape.ragged_k ? shape.num_experts : 1);
  const auto* pa = static_cast<const T*>(a.data_ptr());
  const auto* pb = static_cast<const T*>(b.data_ptr());
  auto* pc = static_cast<T*>(c.data_ptr());
  if constexpr (kHalf) {
    const bool wide_a = address_aligned(a) &&
                        aligned_elements(kAContiguousK ? shape.a_m : shape.a_k) &&
                        aligned_elements(shape.a_expert);
    const bool wide_b = address_aligned(b) &&
                        aligned_elements(kBContiguousK ? shape.b_n : shape.b_k) &&
                        aligned_elements(shape.b_expert);
    grouped_gemm_mma_kernel<T, kAContiguousK, kBContiguousK>
        <<<grid, kThreads, 0, stream>>>(pa, pb, pc, shape, wide_a, wide_b);
  } else {
    grouped_gemm_simt_kernel<T, tile, kAContiguousK, kBContiguousK>
        <<<grid, kThreads, 0, stream>>>(pa, pb, pc, shape);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void add_bias(Tensor& rows, const Tensor& bias, const Tensor& safe, cudaStream_t stream) {
  if (rows.numel() == 0) return;
  MOEOPS_DISPATCH_DEVICE_FLOAT(rows.scalar_type(), "grouped_linear", [&] {
    add_bias_kernel<scalar_t>
        <<<grid_blocks(rows.size(0), kThreads / kWarpSize), kThreads, 0, stream>>>(
            static_cast<scalar_t*>(rows.data_ptr()), static_cast<const scalar_t*>(bias.data_ptr()),
            offsets_data(safe), static_cast<int>(safe.size(0) - 1), rows.size(0), rows.size(1));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

RowPlan plan_rows(const Tensor& offsets, int64_t num_rows, const Tensor& like,
                  cudaStream_t stream) {
  const int64_t num_experts = offsets.size(0) - 1;
  RowPlan plan;
  plan.offsets = empty_on(offsets, {num_experts + 1}, ScalarType::Int);
  if (hopper::refusal(like) == nullptr) {
    plan.tiles = empty_on(offsets, {num_rows / kTileRows + num_experts + 1, 4}, ScalarType::Int);
  }
  const bool tiled = plan.tiles.defined();
  plan_rows_kernel<<<1, kPlanThreads, 0, stream>>>(
      offsets_data(offsets), static_cast<int>(num_experts), num_rows,
      static_cast<int32_t*>(plan.offsets.data_ptr()),
      tiled ? const_cast<int4*>(plan.tile_table()) : nullptr,
      tiled ? const_cast<int32_t*>(plan.num_tiles()) : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return plan;
}

namespace {

// Everywhere but on Hopper, and for what its kernels do not take.
Tensor general_matmul(const Tensor& rows, const Tensor& weight, const Tensor& safe,
                      cudaStream_t stream) {
  const int64_t num_rows = rows.size(0), in = rows.size(1), out = weight.size(1);
  if (num_rows == 0 || out == 0) return empty_on(rows, {num_rows, out}, rows.scalar_type());
  if (in == 0) return torch::stable::new_zeros(rows, {num_rows, out});
  if (torch_grouped_mm_applies(rows) && aligned_elements(in) && aligned_elements(out) &&
      address_aligned(rows) && aligned_matrices(weight)) {
    Tensor boundaries = safe;
    return grouped_mm(rows, torch::stable::transpose(weight, 1, 2),
                      torch::stable::narrow(boundaries, 0, 1, safe.size(0) - 1));
  }
  const bool strided = weight.stride(1) == 1 || weight.stride(2) == 1;
  const Tensor w = strided ? weight : as_contiguous(weight);
  Tensor result = empty_on(rows, {num_rows, out}, rows.scalar_type());
  GroupedGemmShape shape{};
  shape.offsets = offsets_data(safe);
  shape.num_experts = static_cast<int>(safe.size(0) - 1);
  shape.n = out;
  shape.k = in;
  shape.a_m = in;
  shape.a_k = 1;
  shape.b_expert = w.stride(0);
  shape.b_n = w.stride(1);
  shape.b_k = w.stride(2);
  shape.c_m = out;
  MOEOPS_DISPATCH_DEVICE_FLOAT(rows.scalar_type(), "grouped_linear", [&] {
    auto* launch =
        w.stride(2) == 1 ? &launch_gemm<scalar_t, true, true> : &launch_gemm<scalar_t, true, false>;
    launch(rows, w, result, shape, num_rows, stream);
  });
  return result;
}

}  // namespace

Tensor grouped_matmul(const char* op, const Tensor& rows, const Tensor& weight, const RowPlan& plan,
                      const std::optional<Tensor>& bias, cudaStream_t stream) {
  if (hopper::takes(op, {hopper::refusal(rows), hopper::rows_refusal(rows),
                         hopper::weight_refusal(weight), hopper::bias_refusal(bias)})) {
    return hopper::matmul(op, rows, weight, plan, bias, stream);
  }
  Tensor out = general_matmul(rows, weight, plan.offsets, stream);
  if (bias) add_bias(out, *bias, plan.offsets, stream);
  return out;
}

Tensor grouped_weight_grad(const char* op, const Tensor& grad, const Tensor& rows,
                           const RowPlan& plan, cudaStream_t stream) {
  const Tensor& safe = plan.offsets;
  const int64_t num_rows = rows.size(0), in = rows.size(1), out = grad.size(1);
  const int64_t num_experts = safe.size(0) - 1;
  if (num_rows == 0 || in == 0 || out == 0) {
    return torch::stable::new_zeros(rows, {num_experts, out, in});
  }
  if (hopper::takes(
          op, {hopper::refusal(rows), hopper::rows_refusal(rows), hopper::rows_refusal(grad)})) {
    Tensor result = empty_on(rows, {num_experts, out, in}, rows.scalar_type());
    hopper::weight_grad(op, grad, rows, hopper::Operand::kNone, nullptr, plan, result, stream);
    return result;
  }
  if (torch_grouped_mm_applies(rows) && aligned_elements(in) && aligned_elements(out) &&
      address_aligned(rows) && address_aligned(grad)) {
    Tensor boundaries = safe;
    return grouped_mm(torch::stable::transpose(grad, 0, 1), rows,
                      torch::stable::narrow(boundaries, 0, 1, num_experts));
  }
  Tensor result = empty_on(rows, {num_experts, out, in}, rows.scalar_type());
  GroupedGemmShape shape{};
  shape.offsets = offsets_data(safe);
  shape.num_experts = static_cast<int>(num_experts);
  shape.ragged_k = true;
  shape.m = out;
  shape.n = in;
  shape.a_m = 1;
  shape.a_k = out;
  shape.b_n = 1;
  shape.b_k = in;
  shape.c_expert = out * in;
  shape.c_m = in;
  MOEOPS_DISPATCH_DEVICE_FLOAT(rows.scalar_type(), "grouped_linear_weight_grad", [&] {
    launch_gemm<scalar_t, false, false>(grad, rows, result, shape, num_rows, stream);
  });
  return result;
}

namespace {

void launch_sum(const Tensor& rows, const Tensor* row_to_pair, const Tensor* topk_weights,
                int64_t num_rows, const Tensor& safe, Tensor& out, cudaStream_t stream) {
  if (out.numel() == 0) return;
  const int64_t width = rows.size(1), num_experts = safe.size(0) - 1;
  const int64_t tiles =
      num_rows / kSumTile + num_experts;  // upper bound; surplus blocks leave at once
  Tensor partial = empty_on(rows, {tiles, width}, accumulate_type(rows.scalar_type()));
  MOEOPS_DISPATCH_DEVICE_FLOAT(rows.scalar_type(), "grouped_sum", [&] {
    using Acc = device_accumulate_t<scalar_t>;
    GroupedSumArgs<scalar_t> args{};
    args.rows = static_cast<const scalar_t*>(rows.data_ptr());
    args.offsets = offsets_data(safe);
    args.num_experts = static_cast<int>(num_experts);
    args.width = width;
    if (row_to_pair != nullptr) {
      args.row_to_pair = static_cast<const int32_t*>(row_to_pair->data_ptr());
      args.topk_weights = static_cast<const Acc*>(topk_weights->data_ptr());
      args.top_k = static_cast<int>(topk_weights->size(1));
      args.num_pairs = topk_weights->numel();
    }
    args.partial = static_cast<Acc*>(partial.data_ptr());
    constexpr int kElements = kTensorMapAlignment / sizeof(scalar_t);
    const bool vectors = width % kElements == 0 && address_aligned(rows);
    const int64_t columns = kWarpSize * (vectors ? kElements : 1);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(width, columns)));
    auto* kernel = vectors ? &grouped_sum_tiles_kernel<scalar_t, kElements>
                           : &grouped_sum_tiles_kernel<scalar_t, 1>;
    kernel<<<grid, kThreads, 0, stream>>>(args);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const dim3 total_grid(static_cast<unsigned>(ceil_div(width, kThreads)),
                          static_cast<unsigned>(num_experts));
    grouped_sum_total_kernel<scalar_t><<<total_grid, kThreads, 0, stream>>>(
        args.partial, args.offsets, width, static_cast<scalar_t*>(out.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

Tensor grouped_row_sum(const Tensor& rows, const Tensor& safe, cudaStream_t stream) {
  Tensor out = empty_on(rows, {safe.size(0) - 1, rows.size(1)}, rows.scalar_type());
  launch_sum(rows, nullptr, nullptr, rows.size(0), safe, out, stream);
  return out;
}

Tensor grouped_weighted_sum(const Tensor& x, const Tensor& topk_weights, const Tensor& row_to_pair,
                            const Tensor& safe, cudaStream_t stream) {
  Tensor out = empty_on(x, {safe.size(0) - 1, x.size(1)}, x.scalar_type());
  launch_sum(x, &row_to_pair, &topk_weights, row_to_pair.size(0), safe, out, stream);
  return out;
}

void zero_tail(Tensor& rows, const Tensor& safe, cudaStream_t stream) {
  if (rows.numel() == 0) return;
  const int num_sms = device_limits(rows.get_device_index()).num_sms;
  MOEOPS_DISPATCH_DEVICE_FLOAT(rows.scalar_type(), "zero_tail", [&] {
    zero_tail_kernel<scalar_t><<<num_sms, kThreads, 0, stream>>>(
        static_cast<scalar_t*>(rows.data_ptr()), offsets_data(safe),
        static_cast<int>(safe.size(0) - 1), rows.size(0), rows.size(1));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

namespace {

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                      const std::optional<Tensor>& bias) {
  constexpr auto kOp = "grouped_linear";
  check_grouped_linear(kOp, rows, weight, expert_offsets, bias);
  DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows);
  const RowPlan plan = plan_rows(as_contiguous(expert_offsets), rows.size(0), rows, stream);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = as_contiguous(*bias);
  Tensor out = grouped_matmul(kOp, as_contiguous(rows), weight, plan, dense_bias, stream);
  zero_tail(out, plan.offsets, stream);
  return out;
}

Tensor grouped_linear_weight_grad(const Tensor& grad, const Tensor& rows,
                                  const Tensor& expert_offsets, bool transposed) {
  constexpr auto kOp = "grouped_linear_weight_grad";
  check_weight_grad(kOp, grad, rows, expert_offsets);
  DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows);
  const RowPlan plan = plan_rows(as_contiguous(expert_offsets), rows.size(0), rows, stream);
  const Tensor dense_grad = as_contiguous(grad), dense_rows = as_contiguous(rows);
  if (transposed) {  // [E, D, H] in memory
    return torch::stable::transpose(grouped_weight_grad(kOp, dense_rows, dense_grad, plan, stream),
                                    1, 2);
  }
  return grouped_weight_grad(kOp, dense_grad, dense_rows, plan, stream);
}

Tensor grouped_sum(const Tensor& rows, const Tensor& expert_offsets) {
  constexpr auto kOp = "grouped_sum";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  check_offsets(kOp, expert_offsets, rows);
  DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows);
  const RowPlan plan = plan_rows(as_contiguous(expert_offsets), rows.size(0), rows, stream);
  return grouped_row_sum(as_contiguous(rows), plan.offsets, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moeops, CUDA, m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_linear_weight_grad", TORCH_BOX(&grouped_linear_weight_grad));
  m.impl("grouped_sum", TORCH_BOX(&grouped_sum));
}

}  // namespace moeops::cuda
