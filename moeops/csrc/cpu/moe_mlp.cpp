// The expert block on the CPU and its backward. A block of one expert's rows goes through the whole
// expert (gather, up projection, activation, down projection) on one thread while the rows are in
// its second cache level; what the tokens sum up is all that reaches memory besides the results.
// The output rows are not kept for the backward: with dA = dY @ w_down[e] the gradient of a routing
// weight is <dA, a> + <dY, b_down[e]>, so the hidden rows, recomputed from the pre-activation, are
// enough.
#include "checks/moe_mlp.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/activation.h"
#include "cpu/expert_blocks.h"
#include "cpu/grouped_linear.h"
#include "cpu/permute.h"
#include "cpu/products.h"
#include "dispatch.h"
#include "text.h"

namespace moeops::cpu {
namespace {

// Columns of one row worked on at a time: four blocks of this many float64 take half of a
// first-level cache.
constexpr int64_t kColumnBlock = 512;

// Calls body(activation, gated) with the functions of the activation, which was checked, and
// whether rows hold a gate before the up half.
template <typename Body>
void with_activation(const std::string& name, const Body& body) {
  if (name == "swiglu") return body(Silu{}, std::true_type{});
  if (name == "gelu") return body(Gelu{}, std::false_type{});
  if (name == "relu") return body(Relu{}, std::false_type{});
  if (name == "silu") return body(Silu{}, std::false_type{});
  return body(ReluSquared{}, std::false_type{});
}

template <typename Activation, typename Gated, typename scalar_t>
MOEOPS_WIDEST_VECTORS void activate_row(Activation, Gated, const scalar_t* __restrict pre,
                                        int64_t width, scalar_t* __restrict hidden) {
  using acc_t = accumulate_t<scalar_t>;
  for (int64_t i = 0; i < width; ++i) {
    acc_t a = Activation::value(static_cast<acc_t>(pre[i]));
    if constexpr (Gated::value) a *= static_cast<acc_t>(pre[width + i]);
    hidden[i] = static_cast<scalar_t>(a);
  }
}

// hidden [n, H] = act(pre [n, 2H or H]).
void activate(const std::string& activation, const Matrix& pre, const Matrix& hidden) {
  MOEOPS_DISPATCH_FLOAT(hidden.type, "moe_mlp", [&] {
    auto* target = reinterpret_cast<scalar_t*>(hidden.data);
    const auto* source = reinterpret_cast<const scalar_t*>(pre.data);
    with_activation(activation, [&](auto functions, auto gated) {
      torch::stable::parallel_for(0, hidden.rows, grain_rows(hidden.columns),
                                  [&](int64_t begin, int64_t end) {
                                    for (int64_t row = begin; row < end; ++row) {
                                      activate_row(functions, gated, source + row * pre.columns,
                                                   hidden.columns, target + row * hidden.columns);
                                    }
                                  });
    });
  });
}

// The rows [first, first + n) of one expert in the backward of the activation; null where a result
// is not needed or a bias absent.
template <typename scalar_t>
struct BackwardRows {
  scalar_t* grad_pre;                     // [n, 2H or H]
  scalar_t* weighted_hidden;              // [n, H]
  accumulate_t<scalar_t>* grad_weights;   // [T, K]
  accumulate_t<scalar_t>* row_weights;    // [n], the routing weight of each row
  const scalar_t* pre;                    // [n, 2H or H]
  const scalar_t* grad_hidden;            // [n, H]; null if nothing needs it
  const accumulate_t<scalar_t>* weights;  // [T, K]
  const scalar_t* grad_out;               // [n, D_out], unweighted
  const scalar_t* b_down;                 // [D_out]
  const int32_t* row_to_pair;             // [n]
  int64_t width;                          // H
  int64_t out_width;                      // D_out
};

// The columns of `row` from `first` on, at most kColumnBlock; returns their part of the weight's
// gradient. Short loops over what stays in the first cache level: each becomes vector code.
template <typename Activation, typename Gated, typename scalar_t>
MOEOPS_WIDEST_VECTORS accumulate_t<scalar_t> activate_backward_block(
    Activation, Gated, const BackwardRows<scalar_t>& p, int64_t row, accumulate_t<scalar_t> weight,
    int64_t first) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kGated = Gated::value;
  const int64_t width = p.width;
  const int64_t count = std::min(kColumnBlock, width - first);
  const scalar_t* pre = p.pre + row * width * (kGated ? 2 : 1) + first;
  acc_t value[kColumnBlock], slope[kColumnBlock], up[kColumnBlock], grad[kColumnBlock];
  for (int64_t i = 0; i < count; ++i) {
    const acc_t x = static_cast<acc_t>(pre[i]);
    value[i] = Activation::value(x);
    slope[i] = Activation::slope(x);
    if constexpr (kGated) up[i] = static_cast<acc_t>(pre[width + i]);
  }
  if (p.weighted_hidden) {
    scalar_t* hidden = p.weighted_hidden + row * width + first;
    for (int64_t i = 0; i < count; ++i) {
      hidden[i] = static_cast<scalar_t>(weight * (kGated ? value[i] * up[i] : value[i]));
    }
  }
  acc_t dot = 0;
  if (!p.grad_hidden) return dot;
  const scalar_t* grad_hidden = p.grad_hidden + row * width + first;
  for (int64_t i = 0; i < count; ++i) grad[i] = static_cast<acc_t>(grad_hidden[i]);
  if (p.grad_weights) {
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < count; ++i) {
      dot += grad[i] * (kGated ? value[i] * up[i] : value[i]);
    }
  }
  if (p.grad_pre) {
    scalar_t* grad_pre = p.grad_pre + row * width * (kGated ? 2 : 1) + first;
    for (int64_t i = 0; i < count; ++i) {
      const acc_t g = weight * grad[i];
      grad_pre[i] = static_cast<scalar_t>(g * slope[i] * (kGated ? up[i] : acc_t(1)));
      if constexpr (kGated) grad_pre[width + i] = static_cast<scalar_t>(g * value[i]);
    }
  }
  return dot;
}

template <typename scalar_t>
MOEOPS_WIDEST_VECTORS accumulate_t<scalar_t> inner_product(const scalar_t* a, const scalar_t* b,
                                                           int64_t count) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < count; ++i) dot += static_cast<acc_t>(a[i]) * static_cast<acc_t>(b[i]);
  return dot;
}

// One pass over a row's pre-activation and hidden gradient writes everything that depends on
// either.
template <typename scalar_t>
void activate_backward(const std::string& activation, const BackwardRows<scalar_t>& p,
                       int64_t num_rows) {
  using acc_t = accumulate_t<scalar_t>;
  with_activation(activation, [&](auto functions, auto gated) {
    torch::stable::parallel_for(0, num_rows, grain_rows(p.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t pair = p.row_to_pair[row];
        const acc_t weight = p.weights[pair];
        if (p.row_weights) p.row_weights[row] = weight;
        acc_t dot = 0;
        for (int64_t first = 0; first < p.width; first += kColumnBlock) {
          dot += activate_backward_block(functions, gated, p, row, weight, first);
        }
        if (!p.grad_weights) continue;
        if (p.b_down) {
          dot += inner_product(p.grad_out + row * p.out_width, p.b_down, p.out_width);
        }
        p.grad_weights[pair] = dot;
      }
    });
  });
}

// Buffers of rows, several columns wide. Each worker has its own rows, as many as the longest
// block; a buffer that is `kept` holds the rows of experts of several blocks until all blocks are
// done.
class RowBuffers {
 public:
  RowBuffers(const Tensor& like, const std::vector<ExpertBlock>& blocks, int64_t num_workers,
             int64_t num_rows)
      : like_(like),
        num_workers_(num_workers),
        num_rows_(num_rows),
        longest_(blocks.empty() ? 0 : blocks.front().size()),
        split_(std::any_of(blocks.begin(), blocks.end(),
                           [](const ExpertBlock& block) { return !block.whole; })) {}

  struct Buffer {
    Tensor own;                 // [workers * longest, width]
    std::optional<Tensor> all;  // [R, width]
    int64_t longest;

    Matrix rows(int64_t worker, const ExpertBlock& block) const {
      if (all && !block.whole) return row_matrix(*all, block.begin, block.size());
      return row_matrix(own, worker * longest, block.size());
    }
  };

  Buffer make(int64_t width, bool kept = false) const {
    Buffer buffer{torch::stable::new_empty(like_, {num_workers_ * longest_, width}), std::nullopt,
                  longest_};
    if (kept && split_) buffer.all = torch::stable::new_empty(like_, {num_rows_, width});
    return buffer;
  }

 private:
  const Tensor& like_;
  int64_t num_workers_, num_rows_, longest_;
  bool split_;
};

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& row_to_pair,
                                   const Tensor& pair_to_row, const Tensor& expert_offsets,
                                   const Tensor& topk_weights, const Tensor& w_up,
                                   const Tensor& w_down, const std::optional<Tensor>& b_up,
                                   const std::optional<Tensor>& b_down, const Text& activation,
                                   bool keep_pre) {
  constexpr const char* kOp = "moe_mlp";
  check_moe_mlp(kOp, x, topk_weights, w_up, w_down, b_up, b_down, row_to_pair, pair_to_row,
                expert_offsets, activation);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  const Tensor tokens = as_contiguous(x);
  const std::optional<Tensor> up_bias = contiguous_or_none(b_up),
                              down_bias = contiguous_or_none(b_down);
  Tensor pre = torch::stable::new_empty(x, {keep_pre ? plan.num_rows : 0, w_up.size(1)});
  Tensor out = torch::stable::new_empty(x, {plan.num_rows, w_down.size(1)});

  const std::vector<ExpertBlock> blocks = expert_blocks(plan.offsets);
  const Tasks tasks(blocks.size());
  const RowBuffers buffers(x, blocks, tasks.num_workers(), plan.num_rows);
  const auto x_buffer = buffers.make(x.size(1)), hidden_buffer = buffers.make(w_down.size(2));
  const auto pre_buffer = buffers.make(keep_pre ? 0 : w_up.size(1));
  tasks.run([&](int64_t worker, int64_t task) {
    const ExpertBlock& block = blocks[task];
    if (block.size() == 0) return;
    const Matrix x_rows = x_buffer.rows(worker, block), hidden = hidden_buffer.rows(worker, block);
    const Matrix pre_rows =
        keep_pre ? row_matrix(pre, block.begin, block.size()) : pre_buffer.rows(worker, block);
    gather_live_rows(tokens, plan, block.begin, x_rows);
    multiply(x_rows, expert_matrix(w_up, block.expert).transposed(), pre_rows,
             row_of(up_bias, block.expert));
    activate(activation, pre_rows, hidden);
    multiply(hidden, expert_matrix(w_down, block.expert).transposed(),
             row_matrix(out, block.begin, block.size()), row_of(down_bias, block.expert));
  });
  if (!keep_pre) return {sum_rows(out, topk_weights, plan), pre};
  const int64_t live = plan.offsets.num_live;
  clear(row_matrix(pre, live, plan.num_rows - live));
  return {sum_rows(out, topk_weights, plan), pre};
}

// The gradients of one expert's weight [M, N] and bias [M], from the gradient grad [n, M] of what
// the weight computed of rows [n, N]: rows [first, first + count) of them. The gradient is scaled
// by row_weights in the bias alone.
void weight_gradient(int64_t expert, const Matrix& grad, const Matrix& rows,
                     const void* row_weights, int64_t first, int64_t count, Tensor& weight_grad,
                     std::optional<Tensor>& bias_grad) {
  multiply(grad.transposed().row_range(first, count), rows,
           expert_matrix(weight_grad, expert).row_range(first, count));
  if (!bias_grad) return;
  auto* target = row_matrix(*bias_grad, expert, 1).data + first * bias_grad->element_size();
  sum_columns(grad, row_weights, first, count, target);
}

// Which gradients are wanted, and which rows' gradients they take.
struct Needed {
  bool x, topk_weights, w_up, w_down;

  bool grad_pre() const { return x || w_up; }
  bool grad_hidden() const { return grad_pre() || topk_weights; }
};

// What the backward reads, contiguous but for the weights.
struct BackwardInputs {
  Tensor grad_y, x, topk_weights, w_up, w_down;
  std::optional<Tensor> b_up, b_down;
  Tensor pre;
  std::string activation;
};

// The backward of one call: block by block the rows' gradients, and the weights' while the rows are
// at hand; then the weights of the experts whose rows were cut into several blocks.
class BlockBackward {
 public:
  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  BlockBackward(const Plan& plan, const BackwardInputs& in, const Needed& needed)
      : plan_(plan),
        in_(in),
        needed_(needed),
        blocks_(expert_blocks(plan.offsets)),
        tasks_(blocks_.size()) {
    allocate_outputs();
    allocate_buffers();
  }

  Outputs run() {
    tasks_.run([&](int64_t worker, int64_t task) { run_block(worker, blocks_[task]); });
    std::vector<bool> cut(static_cast<size_t>(plan_.offsets.num_experts), false);
    for (const ExpertBlock& block : blocks_) cut[block.expert] = !block.whole;
    if (needed_.w_up) finish(cut, in_.w_up.size(1), &BlockBackward::up_gradient);
    if (needed_.w_down) finish(cut, in_.w_down.size(1), &BlockBackward::down_gradient);
    return {needed_.x ? sum_rows(grad_rows_, std::nullopt, plan_) : none(),
            grad_weights_,
            grad_w_up_,
            grad_w_down_,
            grad_b_up_ ? *grad_b_up_ : none(),
            grad_b_down_ ? *grad_b_down_ : none()};
  }

 private:
  using WeightGradient = void (BlockBackward::*)(int64_t worker, const ExpertBlock& block,
                                                 int64_t first, int64_t count);

  // Outputs must not alias each other, so what is not needed is an empty tensor of its own.
  Tensor none() const { return torch::stable::new_empty(in_.x, {0}); }
  Tensor like(bool needed, const Tensor& t) const {
    return needed ? torch::stable::new_empty(in_.x, t.sizes()) : none();
  }

  void allocate_outputs() {
    grad_w_up_ = like(needed_.w_up, in_.w_up);
    grad_w_down_ = like(needed_.w_down, in_.w_down);
    if (needed_.w_up && in_.b_up) grad_b_up_ = like(true, *in_.b_up);
    if (needed_.w_down && in_.b_down) grad_b_down_ = like(true, *in_.b_down);
    const Tensor& weights = in_.topk_weights;
    // Pairs without a live row keep the zero.
    grad_weights_ =
        needed_.topk_weights ? torch::stable::new_zeros(weights, weights.sizes()) : none();
    row_weights_ = torch::stable::new_empty(weights, {grad_b_down_ ? plan_.num_rows : 0});
    grad_rows_ = torch::stable::new_empty(in_.x, {needed_.x ? plan_.num_rows : 0, in_.x.size(1)});
  }

  void allocate_buffers() {
    const RowBuffers buffers(in_.x, blocks_, tasks_.num_workers(), plan_.num_rows);
    const int64_t up_width = in_.w_up.size(1), width = in_.w_down.size(2);
    grad_out_buffer_ = buffers.make(in_.w_down.size(1), needed_.w_down);
    grad_hidden_buffer_ = buffers.make(needed_.grad_hidden() ? width : 0);
    grad_pre_buffer_ = buffers.make(needed_.grad_pre() ? up_width : 0, needed_.w_up);
    hidden_buffer_ = buffers.make(needed_.w_down ? width : 0, needed_.w_down);
    x_buffer_ = buffers.make(needed_.w_up ? in_.x.size(1) : 0, needed_.w_up);
  }

  void run_block(int64_t worker, const ExpertBlock& block) {
    const Matrix grad_out = grad_out_buffer_.rows(worker, block);
    const Matrix grad_hidden = grad_hidden_buffer_.rows(worker, block);
    const Matrix grad_pre = grad_pre_buffer_.rows(worker, block);
    gather_live_rows(in_.grad_y, plan_, block.begin, grad_out);
    if (needed_.grad_hidden()) {
      multiply(grad_out, expert_matrix(in_.w_down, block.expert), grad_hidden);
    }
    run_pointwise(block, grad_out, grad_hidden, grad_pre, hidden_buffer_.rows(worker, block));
    if (needed_.x) {
      multiply(grad_pre, expert_matrix(in_.w_up, block.expert),
               row_matrix(grad_rows_, block.begin, block.size()));
    }
    if (needed_.w_up) gather_live_rows(in_.x, plan_, block.begin, x_buffer_.rows(worker, block));
    if (!block.whole) return;
    if (needed_.w_up) up_gradient(worker, block, 0, in_.w_up.size(1));
    if (needed_.w_down) down_gradient(worker, block, 0, in_.w_down.size(1));
  }

  void run_pointwise(const ExpertBlock& block, const Matrix& grad_out, const Matrix& grad_hidden,
                     const Matrix& grad_pre, const Matrix& hidden) {
    MOEOPS_DISPATCH_FLOAT(in_.x.scalar_type(), "moe_mlp_backward", [&] {
      using acc_t = accumulate_t<scalar_t>;
      const auto in = [](const void* data) { return static_cast<const scalar_t*>(data); };
      const auto out = [](bool needed, const Matrix& m) {
        return needed ? reinterpret_cast<scalar_t*>(m.data) : nullptr;
      };
      BackwardRows<scalar_t> p;
      p.grad_pre = out(needed_.grad_pre(), grad_pre);
      p.weighted_hidden = out(needed_.w_down, hidden);
      p.grad_weights =
          needed_.topk_weights ? static_cast<acc_t*>(grad_weights_.mutable_data_ptr()) : nullptr;
      p.row_weights =
          grad_b_down_ ? reinterpret_cast<acc_t*>(row_weights_from(block.begin)) : nullptr;
      p.pre = in(row_of(in_.pre, block.begin));
      p.grad_hidden = out(needed_.grad_hidden(), grad_hidden);
      p.weights = static_cast<const acc_t*>(in_.topk_weights.const_data_ptr());
      p.grad_out = in(grad_out.data);
      p.b_down = in(row_of(in_.b_down, block.expert));
      p.row_to_pair = plan_.row_to_pair + block.begin;
      p.width = in_.w_down.size(2);
      p.out_width = in_.w_down.size(1);
      activate_backward(in_.activation, p, block.size());
    });
  }

  char* row_weights_from(int64_t row) {
    return static_cast<char*>(row_weights_.mutable_data_ptr()) + row * row_weights_.element_size();
  }

  // The rows [first, first + count) of a weight's gradient that `block`, of all rows of an expert,
  // has.
  void up_gradient(int64_t worker, const ExpertBlock& block, int64_t first, int64_t count) {
    weight_gradient(block.expert, grad_pre_buffer_.rows(worker, block),
                    x_buffer_.rows(worker, block), nullptr, first, count, grad_w_up_, grad_b_up_);
  }
  void down_gradient(int64_t worker, const ExpertBlock& block, int64_t first, int64_t count) {
    weight_gradient(block.expert, grad_out_buffer_.rows(worker, block),
                    hidden_buffer_.rows(worker, block),
                    grad_b_down_ ? row_weights_from(block.begin) : nullptr, first, count,
                    grad_w_down_, grad_b_down_);
  }

  // The gradients of weights of `height` rows, of the experts that were cut.
  void finish(const std::vector<bool>& cut, int64_t height, WeightGradient gradient) {
    const std::vector<WeightTile> tiles = weight_tiles(plan_.offsets, height, cut);
    Tasks(tiles.size()).run([&](int64_t, int64_t task) {
      const WeightTile& tile = tiles[task];
      const ExpertBlock rows{tile.expert, plan_.offsets.begin(tile.expert),
                             plan_.offsets.end(tile.expert), false};
      (this->*gradient)(0, rows, tile.first, tile.count);
    });
  }

  const Plan& plan_;
  const BackwardInputs& in_;
  const Needed needed_;
  const std::vector<ExpertBlock> blocks_;
  const Tasks tasks_;
  RowBuffers::Buffer grad_out_buffer_, grad_hidden_buffer_, grad_pre_buffer_, hidden_buffer_,
      x_buffer_;
  Tensor grad_rows_, grad_weights_, grad_w_up_, grad_w_down_;
  std::optional<Tensor> grad_b_up_, grad_b_down_;
  Tensor row_weights_;  // of each row, for the gradient of b_down
};

BlockBackward::Outputs moe_mlp_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& row_to_pair, const Tensor& pair_to_row,
    const Tensor& expert_offsets, const Tensor& topk_weights, const Tensor& w_up,
    const Tensor& w_down, const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_down,
    const Tensor& pre_activation, const Text& activation, bool need_x, bool need_topk_weights,
    bool need_w_up, bool need_w_down) {
  constexpr const char* kOp = "moe_mlp_backward";
  check_moe_mlp(kOp, x, topk_weights, w_up, w_down, b_up, b_down, row_to_pair, pair_to_row,
                expert_offsets, activation);
  check_moe_mlp_grads(kOp, grad_y, pre_activation, x, w_up, w_down, row_to_pair);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  const BackwardInputs in{as_contiguous(grad_y),
                          as_contiguous(x),
                          as_contiguous(topk_weights),
                          w_up,
                          w_down,
                          b_up,
                          contiguous_or_none(b_down),
                          as_contiguous(pre_activation),
                          activation};
  return BlockBackward(plan, in, {need_x, need_topk_weights, need_w_up, need_w_down}).run();
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&moeops::cpu::moe_mlp));
  m.impl("moe_mlp_backward", TORCH_BOX(&moeops::cpu::moe_mlp_backward));
}
