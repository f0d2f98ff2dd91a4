// What the two paths of the expert block share: the checked arguments, and the passes around the
// products.
#pragma once

#include <optional>
#include <tuple>

#include "common.h"
#include "grouped_linear.h"
#include "kernels/activation.cuh"

namespace moeops::cuda {

// What both directions take, checked, contiguous, with boundaries that are safe to index with.
struct Block {
  Tensor x, topk_weights, w_up, w_down;
  std::optional<Tensor> b_up, b_down;
  Tensor row_to_pair, pair_to_row;
  RowPlan plan;
  Activation activation;
  cudaStream_t stream;

  int64_t num_rows() const { return row_to_pair.size(0); }
  int64_t hidden_width() const { return w_down.size(2); }
  int64_t out_width() const { return w_down.size(1); }
  int num_experts() const { return static_cast<int>(plan.offsets.size(0) - 1); }
  const int32_t* offsets_data() const {
    return static_cast<const int32_t*>(plan.offsets.data_ptr());
  }
};

// Which gradients are wanted; those of biases follow their weights.
struct Needed {
  bool x, topk_weights, w_up, w_down;
};

// Outputs of the backward; what is not needed stays an empty tensor of its own, because outputs
// must not alias each other.
struct BlockGrads {
  Tensor x, topk_weights, w_up, w_down, b_up, b_down;
};

namespace hopper {

// Whether the block's products and passes run in the Hopper kernels; `more` are what else the
// caller reads.
bool takes_block(const char* op, const Block& block, std::initializer_list<const Tensor*> more);

// y's rows before the weighted sum, [R, D_out]; `pre` is written unless it is undefined.
Tensor expert_rows(const Block& block, Tensor& pre);

void expert_rows_backward(const Block& block, const Tensor& grad_y, const Tensor& pre,
                          const Needed& needed, BlockGrads& grads);

}  // namespace hopper

}  // namespace moeops::cuda
