// The gradients of the expert block's weights and biases on the CPU, from what
// moe_mlp_backward_data kept of each row. An expert of few rows is one task, from the gather to the
// products, on one thread while the rows are in its cache; the rows of a larger one are gathered by
// several, and its products cut into tiles of the weight.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "checks/moe_mlp.h"
#include "cpu/grouped_linear.h"
#include "cpu/parallel.h"
#include "cpu/permute.h"
#include "cpu/row_buffers.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

// Which gradients are wanted, and which of the weights' are [E, in, out] in memory.
struct NeededWeights {
  bool w_up, w_down, b_up, b_down;
  bool transposed_up, transposed_down;

  bool grad_pre() const { return w_up || b_up; }
  bool grad_out() const { return w_down || b_down; }
};

// Contiguous.
struct WeightInputs {
  Tensor grad_y, x, topk_weights, grad_pre, weighted_hidden;
};

class WeightBackward {
 public:
  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  WeightBackward(const Plan& plan, const WeightInputs& in, const NeededWeights& needed)
      : plan_(plan),
        in_(in),
        needed_(needed),
        blocks_(expert_blocks(plan.offsets)),
        tasks_(blocks_.size()) {
    const int64_t num_experts = plan_.offsets.num_experts;
    const auto output = [&](bool is_needed, std::initializer_list<int64_t> sizes) {
      return torch::stable::new_empty(in_.x, is_needed ? sizes : std::initializer_list<int64_t>{0});
    };
    const int64_t up = needed_.grad_pre() ? in_.grad_pre.size(1) : 0;
    const int64_t hidden = needed_.w_down ? in_.weighted_hidden.size(1) : 0;
    const int64_t width = in_.x.size(1), out = in_.grad_y.size(1);
    const auto weight = [&](bool is_needed, bool transposed, int64_t rows, int64_t columns) {
      if (transposed) std::swap(rows, columns);
      return output(is_needed, {num_experts, rows, columns});
    };
    grad_w_up_ = weight(needed_.w_up, needed_.transposed_up, up, width);
    grad_w_down_ = weight(needed_.w_down, needed_.transposed_down, out, hidden);
    grad_b_up_ = output(needed_.b_up, {num_experts, up});
    grad_b_down_ = output(needed_.b_down, {num_experts, out});
    const RowBuffers buffers(in_.x, blocks_, tasks_.num_workers(), plan_.num_rows);
    x_buffer_ = buffers.make(needed_.w_up ? width : 0, needed_.w_up);
    grad_out_buffer_ = buffers.make(needed_.grad_out() ? out : 0, needed_.grad_out());
    if (needed_.b_down) read_row_weights();
  }

  Outputs run() {
    tasks_.run([&](int64_t worker, int64_t task) { run_block(worker, blocks_[task]); });
    std::vector<bool> cut(static_cast<size_t>(plan_.offsets.num_experts), false);
    for (const ExpertBlock& block : blocks_) cut[block.expert] = !block.whole;
    if (needed_.grad_pre()) finish(cut, up_height(), &WeightBackward::up_gradient);
    if (needed_.grad_out()) finish(cut, down_height(), &WeightBackward::down_gradient);
    return {as_weight(grad_w_up_, needed_.transposed_up),
            as_weight(grad_w_down_, needed_.transposed_down), grad_b_up_, grad_b_down_};
  }

 private:
  using Gradient = void (WeightBackward::*)(int64_t worker, const ExpertBlock& block, int64_t first,
                                            int64_t count);

  static Tensor as_weight(const Tensor& grad, bool transposed) {
    return transposed ? torch::stable::transpose(grad, 1, 2) : grad;
  }

  // Rows of a weight's gradient as it lies in memory, the unit in which an expert's is cut.
  int64_t up_height() const { return needed_.transposed_up ? in_.x.size(1) : in_.grad_pre.size(1); }
  int64_t down_height() const {
    return needed_.transposed_down ? in_.weighted_hidden.size(1) : in_.grad_y.size(1);
  }

  // The routing weight of each live row, in the accumulate type.
  void read_row_weights() {
    row_weights_ = torch::stable::new_empty(in_.topk_weights, {plan_.num_rows});
    MOEOPS_DISPATCH_FLOAT(in_.topk_weights.scalar_type(), "moe_mlp_backward_weights", [&] {
      const auto* weights = static_cast<const scalar_t*>(in_.topk_weights.const_data_ptr());
      auto* target = static_cast<scalar_t*>(row_weights_.mutable_data_ptr());
      for (int64_t row = 0; row < plan_.offsets.num_live; ++row) {
        target[row] = weights[plan_.row_to_pair[row]];
      }
    });
  }

  void run_block(int64_t worker, const ExpertBlock& block) {
    if (needed_.w_up) gather_live_rows(in_.x, plan_, block.begin, x_buffer_.rows(worker, block));
    if (needed_.grad_out()) {
      gather_live_rows(in_.grad_y, plan_, block.begin, grad_out_buffer_.rows(worker, block));
    }
    if (!block.whole) return;
    if (needed_.grad_pre()) up_gradient(worker, block, 0, up_height());
    if (needed_.grad_out()) down_gradient(worker, block, 0, down_height());
  }

  // Rows [first, first + count) of an expert's gradient: of the gradient of what the weight made of
  // rows, and these.
  static void weight_gradient(const Matrix& grad, const Matrix& rows, bool transposed,
                              const Tensor& out, int64_t expert, int64_t first, int64_t count) {
    const Matrix &left = transposed ? rows : grad, &right = transposed ? grad : rows;
    multiply(left.transposed().row_range(first, count), right,
             expert_matrix(out, expert).row_range(first, count));
  }

  // The same columns of a bias's gradient; all of them with the first rows of a weight's that is
  // cut along the other side.
  static void bias_gradient(const Matrix& grad, const void* row_weights, bool transposed,
                            const Tensor& out, int64_t expert, int64_t first, int64_t count) {
    if (transposed && first > 0) return;
    char* target = row_matrix(out, expert, 1).data + first * out.element_size();
    sum_columns(grad, row_weights, first, transposed ? grad.columns : count, target);
  }

  // Rows [first, first + count) of the gradients of w_up and b_up of an expert, of which `block`
  // has all rows.
  void up_gradient(int64_t worker, const ExpertBlock& block, int64_t first, int64_t count) {
    const Matrix grad_pre = row_matrix(in_.grad_pre, block.begin, block.size());
    if (needed_.w_up) {
      weight_gradient(grad_pre, x_buffer_.rows(worker, block), needed_.transposed_up, grad_w_up_,
                      block.expert, first, count);
    }
    if (needed_.b_up) {
      bias_gradient(grad_pre, nullptr, needed_.transposed_up, grad_b_up_, block.expert, first,
                    count);
    }
  }

  // The same of w_down, whose rows hold their routing weights, and of b_down, whose do not.
  void down_gradient(int64_t worker, const ExpertBlock& block, int64_t first, int64_t count) {
    const Matrix grad_out = grad_out_buffer_.rows(worker, block);
    if (needed_.w_down) {
      weight_gradient(grad_out, row_matrix(in_.weighted_hidden, block.begin, block.size()),
                      needed_.transposed_down, grad_w_down_, block.expert, first, count);
    }
    if (needed_.b_down) {
      const char* row_weights = static_cast<const char*>(row_weights_.const_data_ptr()) +
                                block.begin * row_weights_.element_size();
      bias_gradient(grad_out, row_weights, needed_.transposed_down, grad_b_down_, block.expert,
                    first, count);
    }
  }

  // The gradients, `height` rows for each expert, of those that were cut.
  void finish(const std::vector<bool>& cut, int64_t height, Gradient gradient) {
    const std::vector<WeightTile> tiles = weight_tiles(plan_.offsets, height, cut);
    Tasks(tiles.size()).run([&](int64_t, int64_t task) {
      const WeightTile& tile = tiles[task];
      const ExpertBlock rows{tile.expert, plan_.offsets.begin(tile.expert),
                             plan_.offsets.end(tile.expert), false};
      (this->*gradient)(0, rows, tile.first, tile.count);
    });
  }

  const Plan& plan_;
  const WeightInputs& in_;
  const NeededWeights needed_;
  const std::vector<ExpertBlock> blocks_;
  const Tasks tasks_;
  RowBuffers::Buffer x_buffer_, grad_out_buffer_;
  Tensor grad_w_up_, grad_w_down_, grad_b_up_, grad_b_down_;
  Tensor row_weights_;  // [R], for the gradient of b_down
};

WeightBackward::Outputs moe_mlp_backward_weights(
    const Tensor& grad_y, const Tensor& x, const Tensor& row_to_pair, const Tensor& pair_to_row,
    const Tensor& expert_offsets, const Tensor& topk_weights, const Tensor& grad_pre,
    const Tensor& weighted_hidden, bool need_w_up, bool need_w_down, bool need_b_up,
    bool need_b_down, bool transposed_up, bool transposed_down) {
  constexpr const char* kOp = "moe_mlp_backward_weights";
  check_moe_mlp_weight_grads(kOp, grad_y, x, row_to_pair, pair_to_row, expert_offsets, topk_weights,
                             grad_pre, weighted_hidden, need_w_up || need_b_up, need_w_down);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  const WeightInputs in{as_contiguous(grad_y), as_contiguous(x), as_contiguous(topk_weights),
                        as_contiguous(grad_pre), as_contiguous(weighted_hidden)};
  // A bias alone is cut along its own columns.
  const bool turn_up = need_w_up && transposed_up && x.size(1) > 0;
  const bool turn_down = need_w_down && transposed_down && weighted_hidden.size(1) > 0;
  return WeightBackward(plan, in,
                        {need_w_up, need_w_down, need_b_up, need_b_down, turn_up, turn_down})
      .run();
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("moe_mlp_backward_weights", TORCH_BOX(&moeops::cpu::moe_mlp_backward_weights));
}
