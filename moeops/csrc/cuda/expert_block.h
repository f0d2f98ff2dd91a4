// What the two paths of the expert block share: the checked arguments, and the passes around the
// products.
#pragma once

#include <optional>
#include <tuple>

#include "common.h"
#include "grouped_linear.h"
#include "kernels/activation.cuh"

namespace moeops::cuda {

// Tokens and what is known of their pairs, checked, contiguous, with boundaries that are safe to
// index with.
struct PlannedTokens {
  Tensor x, topk_weights;
  Tensor row_to_pair, pair_to_row;
  RowPlan plan;
  cudaStream_t stream;

  int64_t num_rows() const { return row_to_pair.size(0); }
  int num_experts() const { return static_cast<int>(plan.offsets.size(0) - 1); }
  const int32_t* offsets_data() const {
    return static_cast<const int32_t*>(plan.offsets.data_ptr());
  }
};

// The same with experts: what the forward and the first half of the backward take.
struct Block : PlannedTokens {
  Tensor w_up, w_down;
  std::optional<Tensor> b_up, b_down;
  Activation activation;
  GluConstants<double> unit;  // of activations with options

  int64_t hidden_width() const { return w_down.size(2); }
  int64_t out_width() const { return w_down.size(1); }
};

// Which outputs of moe_mlp_backward_data are wanted.
struct NeededData {
  bool x, topk_weights, grad_pre, weighted_hidden;
};

// Its outputs; what is not needed stays an empty tensor of its own, because outputs must not alias
// each other. Rows past the last offset are not written here.
struct DataGrads {
  Tensor x, topk_weights, pre, weighted_hidden;
};

// Which weights' gradients are wanted, and which of them as [E, in, out].
struct NeededWeights {
  bool w_up, w_down;
  bool transposed_up, transposed_down;
};

namespace hopper {

// Whether the block's products and passes run in the Hopper kernels; `more` are what else the
// caller reads.
bool takes_block(const char* op, const Block& block, std::initializer_list<const Tensor*> more);

// y's rows before the weighted sum, [R, D_out]; `pre` is written unless it is undefined.
Tensor expert_rows(const Block& block, Tensor& pre);

// grads.pre is written for x's gradient, too.
void data_backward(const Block& block, const Tensor& grad_y, const Tensor& pre,
                   const NeededData& needed, DataGrads& grads);

// The same question for the gradients of weights; null where a gradient is not wanted.
bool takes_weight_grads(const char* op, const PlannedTokens& tokens, const Tensor& grad_y,
                        const Tensor* grad_pre, const Tensor* weighted_hidden);

void weight_backward(const PlannedTokens& tokens, const Tensor& grad_y, const Tensor& grad_pre,
                     const Tensor& weighted_hidden, const NeededWeights& needed, Tensor& grad_w_up,
                     Tensor& grad_w_down);

}  // namespace hopper

}  // namespace moeops::cuda
