// The expert block in the Hopper kernels: gathers and activations happen inside the products.
#include "expert_block.h"
#include "hopper/hopper.h"
#include "kernels/vector.cuh"
#include "permute.h"

namespace moeops::cuda::hopper {

namespace {

constexpr int kThreads = 256;

Gather gather_of(const PlannedTokens& block) {
  return {block.row_to_pair, block.pair_to_row.size(1), block.pair_to_row.numel()};
}

struct PairGradArgs {
  const float* partial;  // [R, tiles]
  int tiles;
  const int32_t* pair_to_row;
  const int32_t* offsets;
  int num_experts, top_k;
  int64_t num_rows, num_pairs, out_width;
  const void *grad_y, *b_down;  // [T, D_out], [E, D_out]
  float* grad_topk_weights;
};

// The gradient of a pair's routing weight: the sum of its row's partial products in order, zero for
// a dropped pair. One thread owns a pair.
__global__ void __launch_bounds__(kThreads) pair_grad_kernel(const PairGradArgs args) {
  const int64_t live = live_rows(args.offsets, args.num_experts, args.num_rows);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= args.num_pairs) return;
  const int64_t row = args.pair_to_row[pair];
  float sum = 0;
  if (row >= 0 && row < live) {
    for (int i = 0; i < args.tiles; ++i) sum += args.partial[row * args.tiles + i];
  }
  args.grad_topk_weights[pair] = sum;
}

// Adds <grad_y of the token, b_down of the expert>. One warp owns a pair.
template <typename T>
__global__ void __launch_bounds__(kThreads) pair_grad_bias_kernel(const PairGradArgs args) {
  constexpr int kElements = 16 / sizeof(T);
  using Vec = Vector<T, kElements>;
  const int64_t live = live_rows(args.offsets, args.num_experts, args.num_rows);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t pair =
      static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (pair >= args.num_pairs) return;
  const int64_t row = args.pair_to_row[pair];
  if (row < 0 || row >= live) return;
  const int expert = expert_of_row(args.offsets, args.num_experts, row);
  const T* grad = static_cast<const T*>(args.grad_y) + pair / args.top_k * args.out_width;
  const T* bias = static_cast<const T*>(args.b_down) + expert * args.out_width;
  float dot = 0;
  for (int64_t c = lane * kElements; c < args.out_width; c += kWarpSize * kElements) {
    const auto g = load_vector<Vec>(grad + c), b = load_vector<Vec>(bias + c);
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      dot += to_accumulate(g.value[i]) * to_accumulate(b.value[i]);
  }
  dot = warp_sum(dot);
  if (lane == 0) args.grad_topk_weights[pair] += dot;
}

void pair_grads(const Block& block, const Tensor& grad_y, const Tensor& partial, Tensor& grads) {
  const int64_t num_pairs = block.pair_to_row.numel();
  const PairGradArgs args{static_cast<const float*>(partial.data_ptr()),
                          static_cast<int>(partial.size(1)),
                          static_cast<const int32_t*>(block.pair_to_row.data_ptr()),
                          block.offsets_data(),
                          block.num_experts(),
                          static_cast<int>(block.pair_to_row.size(1)),
                          block.num_rows(),
                          num_pairs,
                          block.out_width(),
                          grad_y.data_ptr(),
                          block.b_down ? block.b_down->data_ptr() : nullptr,
                          static_cast<float*>(grads.data_ptr())};
  pair_grad_kernel<<<grid_blocks(num_pairs, kThreads), kThreads, 0, block.stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!block.b_down) return;
  auto* kernel = grad_y.scalar_type() == ScalarType::Half ? &pair_grad_bias_kernel<__half>
                                                          : &pair_grad_bias_kernel<__nv_bfloat16>;
  kernel<<<grid_blocks(num_pairs, kThreads / kWarpSize), kThreads, 0, block.stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

const char* rows_of_plan_refusal(const PlannedTokens& block) {
  constexpr int64_t kMaxPairs = int64_t{1} << 31;
  if (block.num_rows() == 0 || block.pair_to_row.numel() == 0) return "there are no rows";
  if (block.num_rows() >= kMaxRows) return "there are 2^30 rows or more";
  if (block.pair_to_row.numel() >= kMaxPairs) return "there are 2^31 pairs or more";
  return nullptr;
}

}  // namespace

bool takes_block(const char* op, const Block& block, std::initializer_list<const Tensor*> more) {
  if (!takes(op, {refusal(block.x), rows_refusal(block.x), weight_refusal(block.w_up),
                  weight_refusal(block.w_down), bias_refusal(block.b_up),
                  rows_of_plan_refusal(block)})) {
    return false;
  }
  for (const Tensor* tensor : more) {
    if (!takes(op, {rows_refusal(*tensor)})) return false;
  }
  // Biases of w_down are read in vectors where the routing weights' gradient needs them.
  return !block.b_down || more.size() == 0 ||
         takes(op, {reinterpret_cast<uintptr_t>(block.b_down->data_ptr()) % 16 == 0
                        ? nullptr
                        : "b_down must begin at a multiple of 16 bytes"});
}

Tensor expert_rows(const Block& block, Tensor& pre) {
  Tensor hidden =
      empty_on(block.x, {block.num_rows(), block.hidden_width()}, block.x.scalar_type());
  up(block.x, gather_of(block), block.w_up, block.b_up, block.activation, block.unit, block.plan,
     pre, hidden, block.stream);
  return matmul("w_down", hidden, block.w_down, block.plan, std::nullopt, block.stream);
}

void data_backward(const Block& block, const Tensor& grad_y, const Tensor& pre,
                   const NeededData& needed, DataGrads& grads) {
  const auto type = block.x.scalar_type();
  const int64_t num_rows = block.num_rows();
  DownBackward down{grad_y, block.w_down, pre, block.topk_weights, {}, {}, {}};
  if (needed.x || needed.grad_pre) down.grad_pre = empty_on(pre, pre.sizes(), type);
  if (needed.weighted_hidden) {
    down.weighted_hidden = empty_on(pre, {num_rows, block.hidden_width()}, type);
  }
  if (needed.topk_weights) {
    const int64_t tiles = down_backward_tiles(block.w_down, block.activation, block.plan, num_rows);
    down.partial = empty_on(pre, {num_rows, tiles}, ScalarType::Float);
    grads.topk_weights =
        empty_on(block.topk_weights, block.topk_weights.sizes(), block.topk_weights.scalar_type());
  }
  down_backward(down, gather_of(block), block.activation, block.unit, block.plan, block.stream);
  if (needed.topk_weights) pair_grads(block, grad_y, down.partial, grads.topk_weights);
  down.partial = Tensor();
  if (needed.x) {
    const Tensor rows =
        matmul("x's gradient", down.grad_pre, torch::stable::transpose(block.w_up, 1, 2),
               block.plan, std::nullopt, block.stream);
    grads.x = empty_on(block.x, block.x.sizes(), type);
    unpermute(rows, std::nullopt, block.pair_to_row, block.plan.offsets, grads.x, block.stream);
  }
  if (down.grad_pre.defined()) grads.pre = down.grad_pre;
  if (needed.weighted_hidden) grads.weighted_hidden = down.weighted_hidden;
}

bool takes_weight_grads(const char* op, const PlannedTokens& tokens, const Tensor& grad_y,
                        const Tensor* grad_pre, const Tensor* weighted_hidden) {
  if (!takes(op, {refusal(tokens.x), rows_refusal(tokens.x), rows_refusal(grad_y),
                  rows_of_plan_refusal(tokens)})) {
    return false;
  }
  for (const Tensor* rows : {grad_pre, weighted_hidden}) {
    if (rows != nullptr && !takes(op, {rows_refusal(*rows)})) return false;
  }
  return true;
}

void weight_backward(const PlannedTokens& tokens, const Tensor& grad_y, const Tensor& grad_pre,
                     const Tensor& weighted_hidden, const NeededWeights& needed, Tensor& grad_w_up,
                     Tensor& grad_w_down) {
  const Gather gather = gather_of(tokens);
  const auto gradient = [&](const char* product, const Tensor& p, const Tensor& q,
                            Operand gathered) {
    Tensor out =
        empty_on(tokens.x, {tokens.num_experts(), p.size(1), q.size(1)}, tokens.x.scalar_type());
    weight_grad(product, p, q, gathered, &gather, tokens.plan, out, tokens.stream);
    return out;
  };
  if (needed.w_up) {
    grad_w_up = needed.transposed_up ? gradient("w_up's gradient", tokens.x, grad_pre, Operand::kP)
                                     : gradient("w_up's gradient", grad_pre, tokens.x, Operand::kQ);
  }
  if (needed.w_down) {
    grad_w_down = needed.transposed_down
                      ? gradient("w_down's gradient", weighted_hidden, grad_y, Operand::kQ)
                      : gradient("w_down's gradient", grad_y, weighted_hidden, Operand::kP);
  }
}

}  // namespace moeops::cuda::hopper
