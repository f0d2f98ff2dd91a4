// The expert block on the CPU and what tokens wait for of its backward; the weights' gradients are
// in moe_mlp_weights.cpp. A block of one expert's rows goes through the whole
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
#include "cpu/permute.h"
#include "cpu/products.h"
#include "cpu/row_buffers.h"
#include "dispatch.h"
#include "text.h"

namespace moeops::cpu {
namespace {

// Columns of one row worked on at a time: four blocks of this many float64 take half of a
// first-level cache.
constexpr int64_t kColumnBlock = 512;

// What a row of the pre-activation holds.
enum class Halves { kNone, kOneByOne, kInTurns };  // the up half alone; gate, then up; in turns
template <Halves kHalves>
using HalvesConstant = std::integral_constant<Halves, kHalves>;

// Calls body(activation, halves) with the functions of the activation, which was checked.
template <typename acc_t, typename Body>
void with_activation(const ActivationOptions& options, const Body& body) {
  constexpr HalvesConstant<Halves::kNone> kNone;
  constexpr HalvesConstant<Halves::kOneByOne> kOneByOne;
  const std::string& name = options.name;
  if (options.plain_swiglu()) return body(Swiglu{}, kOneByOne);
  if (options.gated() && options.interleaved) {
    return body(Glu<acc_t>(options), HalvesConstant<Halves::kInTurns>{});
  }
  if (options.gated()) return body(Glu<acc_t>(options), kOneByOne);
  if (name == "gelu") return body(Gelu{}, kNone);
  if (name == "relu") return body(Relu{}, kNone);
  if (name == "silu") return body(Silu{}, kNone);
  return body(ReluSquared{}, kNone);
}

// Where a row of `width` hidden values has the gate (or what is alone) and the up half of value i.
template <Halves kHalves>
MOEOPS_VECTOR_INLINE int64_t gate_at(int64_t i) {
  return kHalves == Halves::kInTurns ? 2 * i : i;
}
template <Halves kHalves>
MOEOPS_VECTOR_INLINE int64_t up_at(int64_t i, int64_t width) {
  return kHalves == Halves::kInTurns ? 2 * i + 1 : width + i;
}

template <typename Activation, Halves kHalves, typename scalar_t>
MOEOPS_WIDEST_VECTORS void activate_row(Activation act, HalvesConstant<kHalves>,
                                        const scalar_t* __restrict pre, int64_t width,
                                        scalar_t* __restrict hidden) {
  using acc_t = accumulate_t<scalar_t>;
  for (int64_t i = 0; i < width; ++i) {
    acc_t a = act.value(static_cast<acc_t>(pre[gate_at<kHalves>(i)]));
    if constexpr (kHalves != Halves::kNone) {
      a *= act.up(static_cast<acc_t>(pre[up_at<kHalves>(i, width)]));
    }
    hidden[i] = static_cast<scalar_t>(a);
  }
}

// hidden [n, H] = act(pre [n, 2H or H]).
void activate(const ActivationOptions& activation, const Matrix& pre, const Matrix& hidden) {
  MOEOPS_DISPATCH_FLOAT(hidden.type, "moe_mlp", [&] {
    auto* target = reinterpret_cast<scalar_t*>(hidden.data);
    const auto* source = reinterpret_cast<const scalar_t*>(pre.data);
    with_activation<accumulate_t<scalar_t>>(activation, [&](auto functions, auto halves) {
      torch::stable::parallel_for(0, hidden.rows, grain_rows(hidden.columns),
                                  [&](int64_t begin, int64_t end) {
                                    for (int64_t row = begin; row < end; ++row) {
                                      activate_row(functions, halves, source + row * pre.columns,
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
template <typename Activation, Halves kHalves, typename scalar_t>
MOEOPS_WIDEST_VECTORS accumulate_t<scalar_t> activate_backward_block(
    Activation act, HalvesConstant<kHalves>, const BackwardRows<scalar_t>& p, int64_t row,
    accumulate_t<scalar_t> weight, int64_t first) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kGated = kHalves != Halves::kNone;
  const int64_t width = p.width;
  const int64_t count = std::min(kColumnBlock, width - first);
  const int64_t start = row * width * (kGated ? 2 : 1) + gate_at<kHalves>(first);
  const scalar_t* pre = p.pre + start;
  acc_t value[kColumnBlock], slope[kColumnBlock], up[kColumnBlock], grad[kColumnBlock];
  for (int64_t i = 0; i < count; ++i) {
    const acc_t x = static_cast<acc_t>(pre[gate_at<kHalves>(i)]);
    value[i] = act.value(x);
    slope[i] = act.slope(x);
    if constexpr (kGated) up[i] = act.up(static_cast<acc_t>(pre[up_at<kHalves>(i, width)]));
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
    scalar_t* grad_pre = p.grad_pre + start;
    for (int64_t i = 0; i < count; ++i) {
      const acc_t g = weight * grad[i];
      grad_pre[gate_at<kHalves>(i)] =
          static_cast<scalar_t>(g * slope[i] * (kGated ? up[i] : acc_t(1)));
      if constexpr (kGated) {
        const acc_t up_slope = act.up_slope(static_cast<acc_t>(pre[up_at<kHalves>(i, width)]));
        grad_pre[up_at<kHalves>(i, width)] = static_cast<scalar_t>(g * value[i] * up_slope);
      }
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
void activate_backward(const ActivationOptions& activation, const BackwardRows<scalar_t>& p,
                       int64_t num_rows) {
  using acc_t = accumulate_t<scalar_t>;
  with_activation<acc_t>(activation, [&](auto functions, auto halves) {
    torch::stable::parallel_for(0, num_rows, grain_rows(p.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t pair = p.row_to_pair[row];
        const acc_t weight = p.weights[pair];
        acc_t dot = 0;
        for (int64_t first = 0; first < p.width; first += kColumnBlock) {
          dot += activate_backward_block(functions, halves, p, row, weight, first);
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

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& row_to_pair,
                                   const Tensor& pair_to_row, const Tensor& expert_offsets,
                                   const Tensor& topk_weights, const Tensor& w_up,
                                   const Tensor& w_down, const std::optional<Tensor>& b_up,
                                   const std::optional<Tensor>& b_down, const Text& name,
                                   double alpha, std::optional<double> limit, double offset,
                                   bool interleaved, bool keep_pre) {
  constexpr const char* kOp = "moe_mlp";
  const ActivationOptions activation{name, alpha, limit, offset, interleaved};
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

// Which outputs of moe_mlp_backward_data are wanted.
struct NeededData {
  bool x, topk_weights, grad_pre, weighted_hidden;

  bool any_grad_pre() const { return x || grad_pre; }
  bool grad_hidden() const { return any_grad_pre() || topk_weights; }
};

// What moe_mlp_backward_data reads, contiguous but for the weights.
struct DataInputs {
  Tensor grad_y, x, topk_weights, w_up, w_down;
  std::optional<Tensor> b_down;
  Tensor pre;
  ActivationOptions activation;
};

// The first half of the backward, block by block: what tokens and their routing weights wait for,
// and of each row what the weights' gradients need.
class DataBackward {
 public:
  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  DataBackward(const Plan& plan, const DataInputs& in, const NeededData& needed)
      : plan_(plan),
        in_(in),
        needed_(needed),
        blocks_(expert_blocks(plan.offsets)),
        tasks_(blocks_.size()) {
    const int64_t up_width = in_.w_up.size(1), width = in_.w_down.size(2);
    const Tensor& weights = in_.topk_weights;
    // Pairs without a live row keep the zero.
    grad_weights_ = needed_.topk_weights ? torch::stable::new_zeros(weights, weights.sizes())
                                         : torch::stable::new_empty(in_.x, {0});
    grad_rows_ = rows(needed_.x, in_.x.size(1));
    grad_pre_ = rows(needed_.grad_pre, up_width);
    weighted_hidden_ = rows(needed_.weighted_hidden, width);
    const RowBuffers buffers(in_.x, blocks_, tasks_.num_workers(), plan_.num_rows);
    grad_out_buffer_ = buffers.make(in_.w_down.size(1));
    grad_hidden_buffer_ = buffers.make(needed_.grad_hidden() ? width : 0);
    grad_pre_buffer_ = buffers.make(needed_.x && !needed_.grad_pre ? up_width : 0);
  }

  Outputs run() {
    tasks_.run([&](int64_t worker, int64_t task) { run_block(worker, blocks_[task]); });
    const int64_t live = plan_.offsets.num_live, tail = plan_.num_rows - live;
    if (needed_.grad_pre) clear(row_matrix(grad_pre_, live, tail));
    if (needed_.weighted_hidden) clear(row_matrix(weighted_hidden_, live, tail));
    const Tensor grad_x = needed_.x ? sum_rows(grad_rows_, std::nullopt, plan_)
                                    : torch::stable::new_empty(in_.x, {0});
    return {grad_x, grad_weights_, grad_pre_, weighted_hidden_};
  }

 private:
  // Outputs must not alias each other, so what is not needed is an empty tensor of its own.
  Tensor rows(bool needed, int64_t width) const {
    if (!needed) return torch::stable::new_empty(in_.x, {0});
    return torch::stable::new_empty(in_.x, {plan_.num_rows, width});
  }

  void run_block(int64_t worker, const ExpertBlock& block) {
    const Matrix grad_out = grad_out_buffer_.rows(worker, block);
    const Matrix grad_hidden = grad_hidden_buffer_.rows(worker, block);
    const Matrix grad_pre = needed_.grad_pre ? row_matrix(grad_pre_, block.begin, block.size())
                                             : grad_pre_buffer_.rows(worker, block);
    gather_live_rows(in_.grad_y, plan_, block.begin, grad_out);
    if (needed_.grad_hidden()) {
      multiply(grad_out, expert_matrix(in_.w_down, block.expert), grad_hidden);
    }
    run_pointwise(block, grad_out, grad_hidden, grad_pre);
    if (needed_.x) {
      multiply(grad_pre, expert_matrix(in_.w_up, block.expert),
               row_matrix(grad_rows_, block.begin, block.size()));
    }
  }

  void run_pointwise(const ExpertBlock& block, const Matrix& grad_out, const Matrix& grad_hidden,
                     const Matrix& grad_pre) {
    MOEOPS_DISPATCH_FLOAT(in_.x.scalar_type(), "moe_mlp_backward_data", [&] {
      using acc_t = accumulate_t<scalar_t>;
      const auto in = [](const void* data) { return static_cast<const scalar_t*>(data); };
      const auto out = [](bool needed, const Matrix& m) {
        return needed ? reinterpret_cast<scalar_t*>(m.data) : nullptr;
      };
      BackwardRows<scalar_t> p;
      p.grad_pre = out(needed_.any_grad_pre(), grad_pre);
      p.weighted_hidden = needed_.weighted_hidden
                              ? out(true, row_matrix(weighted_hidden_, block.begin, block.size()))
                              : nullptr;
      p.grad_weights =
          needed_.topk_weights ? static_cast<acc_t*>(grad_weights_.mutable_data_ptr()) : nullptr;
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

  const Plan& plan_;
  const DataInputs& in_;
  const NeededData needed_;
  const std::vector<ExpertBlock> blocks_;
  const Tasks tasks_;
  RowBuffers::Buffer grad_out_buffer_, grad_hidden_buffer_, grad_pre_buffer_;
  Tensor grad_rows_, grad_weights_, grad_pre_, weighted_hidden_;
};

DataBackward::Outputs moe_mlp_backward_data(
    const Tensor& grad_y, const Tensor& x, const Tensor& row_to_pair, const Tensor& pair_to_row,
    const Tensor& expert_offsets, const Tensor& topk_weights, const Tensor& w_up,
    const Tensor& w_down, const std::optional<Tensor>& b_up, const std::optional<Tensor>& b_down,
    const Tensor& pre_activation, const Text& name, double alpha, std::optional<double> limit,
    double offset, bool interleaved, bool need_x, bool need_topk_weights, bool need_grad_pre,
    bool need_weighted_hidden) {
  constexpr const char* kOp = "moe_mlp_backward_data";
  const ActivationOptions activation{name, alpha, limit, offset, interleaved};
  check_moe_mlp(kOp, x, topk_weights, w_up, w_down, b_up, b_down, row_to_pair, pair_to_row,
                expert_offsets, activation);
  check_moe_mlp_grads(kOp, grad_y, pre_activation, x, w_up, w_down, row_to_pair);
  const Plan plan = read_plan(kOp, row_to_pair, pair_to_row, expert_offsets, x);
  const DataInputs in{as_contiguous(grad_y),
                      x,
                      as_contiguous(topk_weights),
                      w_up,
                      w_down,
                      contiguous_or_none(b_down),
                      as_contiguous(pre_activation),
                      activation};
  return DataBackward(plan, in, {need_x, need_topk_weights, need_grad_pre, need_weighted_hidden})
      .run();
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("moe_mlp", TORCH_BOX(&moeops::cpu::moe_mlp));
  m.impl("moe_mlp_backward_data", TORCH_BOX(&moeops::cpu::moe_mlp_backward_data));
}
