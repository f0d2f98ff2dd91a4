#include "hopper/hopper.h"
#include "hopper/launch_rows.cuh"
#include "hopper/launch_weight_grad.cuh"

namespace moeops::cuda::hopper {

namespace {

// Runs f with the element type of a half-precision tensor.
template <typename F>
void dispatch_half(ScalarType type, const F& f) {
  if (type == ScalarType::Half) {
    f(__half{});
  } else {
    f(__nv_bfloat16{});
  }
}

int64_t rows_per_expert(int64_t num_rows, const RowPlan& plan) {
  return num_rows / (plan.offsets.size(0) - 1);
}

RowsLaunch rows_launch(const char* product, const Tensor& a, int64_t num_rows, const Gather* gather,
                       const Tensor& weight, int64_t n, const RowPlan& plan, cudaStream_t stream) {
  return {product,
          a.scalar_type(),
          a.data_ptr(),
          a.size(0),
          num_rows,
          gather,
          WeightView(weight),
          n,
          {nullptr, nullptr, nullptr, nullptr, row_source(gather), nullptr, {}},
          nullptr,
          plan,
          a.get_device_index(),
          stream};
}

GluConstants<float> in_float(const GluConstants<double>& unit) {
  return {static_cast<float>(unit.alpha), static_cast<float>(unit.cubic),
          static_cast<float>(unit.limit), static_cast<float>(unit.offset)};
}

void* data_or_null(const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; }

}  // namespace

Tensor matmul(const char* product, const Tensor& rows, const Tensor& weight, const RowPlan& plan,
              const std::optional<Tensor>& bias, cudaStream_t stream) {
  const int64_t num_rows = rows.size(0), n = weight.size(1);
  Tensor out = empty_on(rows, {num_rows, n}, rows.scalar_type());
  RowsLaunch problem = rows_launch(product, rows, num_rows, nullptr, weight, n, plan, stream);
  problem.epilogue.out = out.data_ptr();
  problem.epilogue.bias = bias ? bias->data_ptr() : nullptr;
  const RowsChoice choice =
      choose_store({n, weight.size(2), rows_per_expert(num_rows, plan)}, problem.weight.across());
  dispatch_half(rows.scalar_type(),
                [&](auto type) { launch_store<decltype(type)>(problem, choice); });
  return out;
}

void up(const Tensor& x, const Gather& gather, const Tensor& w_up,
        const std::optional<Tensor>& b_up, Activation activation, const GluConstants<double>& unit,
        const RowPlan& plan, Tensor& pre, Tensor& hidden, cudaStream_t stream) {
  const int64_t num_rows = hidden.size(0), n = hidden.size(1);
  RowsLaunch problem = rows_launch("w_up", x, num_rows, &gather, w_up, n, plan, stream);
  problem.epilogue.out = data_or_null(pre);
  problem.epilogue.hidden = hidden.data_ptr();
  problem.epilogue.bias = b_up ? b_up->data_ptr() : nullptr;
  problem.epilogue.unit = in_float(unit);
  const bool across = problem.weight.across();
  // Units with options have one tile, as activations without a gate do, but where their halves of
  // blocks of columns need the tile of swiglu.
  const bool tiles_of_swiglu =
      activation == Activation::kSwiglu || (activation == Activation::kGlu && across);
  const RowsChoice choice = choose_up({w_up.size(1), w_up.size(2), rows_per_expert(num_rows, plan)},
                                      tiles_of_swiglu, across);
  dispatch_half(x.scalar_type(), [&](auto type) {
    if (activation == Activation::kSwiglu) {
      launch_gated_up<decltype(type)>(problem, choice);
    } else if (has_options(activation)) {
      launch_glu_up<decltype(type)>(problem, activation == Activation::kGluInTurns, choice);
    } else {
      launch_plain_up<decltype(type)>(problem, activation, choice);
    }
  });
}

namespace {

// W of the backward: the gradient of hidden is grad_y times w_down as [E, H, D].
RowsChoice backward_choice(const Tensor& transposed, Activation activation, const RowPlan& plan,
                           int64_t num_rows) {
  const Unit unit = activation == Activation::kSwiglu ? Unit::kSwiglu
                    : is_gated(activation)            ? Unit::kWithOptions
                                                      : Unit::kPlain;
  return choose_down_backward(
      {transposed.size(1), transposed.size(2), rows_per_expert(num_rows, plan)}, unit,
      device_limits(transposed.get_device_index()).memory_speed);
}

}  // namespace

int64_t down_backward_tiles(const Tensor& w_down, Activation activation, const RowPlan& plan,
                            int64_t num_rows) {
  const Tensor transposed = torch::stable::transpose(w_down, 1, 2);
  const RowsChoice choice = backward_choice(transposed, activation, plan, num_rows);
  return ceil_div(transposed.size(1), backward_columns(choice.tile));
}

void down_backward(DownBackward& tensors, const Gather& gather, Activation activation,
                   const GluConstants<double>& unit, const RowPlan& plan, cudaStream_t stream) {
  const Tensor transposed = torch::stable::transpose(tensors.w_down, 1, 2);
  const int64_t num_rows = tensors.pre.size(0);
  RowsLaunch problem = rows_launch("w_down in the backward", tensors.grad_y, num_rows, &gather,
                                   transposed, transposed.size(1), plan, stream);
  problem.pre = tensors.pre.data_ptr();
  problem.epilogue.out = data_or_null(tensors.grad_pre);
  problem.epilogue.hidden = data_or_null(tensors.weighted_hidden);
  problem.epilogue.partial = static_cast<float*>(data_or_null(tensors.partial));
  problem.epilogue.topk_weights = static_cast<const float*>(tensors.topk_weights.data_ptr());
  problem.epilogue.unit = in_float(unit);
  const RowsChoice choice = backward_choice(transposed, activation, plan, num_rows);
  dispatch_half(tensors.grad_y.scalar_type(), [&](auto type) {
    if (activation == Activation::kSwiglu) {
      launch_gated_backward<decltype(type)>(problem, choice);
    } else if (has_options(activation)) {
      launch_glu_backward<decltype(type)>(problem, activation == Activation::kGluInTurns, choice);
    } else {
      launch_plain_backward<decltype(type)>(problem, activation, choice);
    }
  });
}

void weight_grad(const char* product, const Tensor& p, const Tensor& q, Operand gathered,
                 const Gather* gather, const RowPlan& plan, Tensor& out, cudaStream_t stream) {
  const int64_t num_experts = out.size(0), m = out.size(1), n = out.size(2);
  const WeightGradLaunch problem{product,
                                 p.scalar_type(),
                                 p.data_ptr(),
                                 q.data_ptr(),
                                 p.size(0),
                                 q.size(0),
                                 num_experts,
                                 m,
                                 n,
                                 gathered,
                                 gather,
                                 plan,
                                 out.data_ptr(),
                                 p.get_device_index(),
                                 stream};
  const int64_t num_rows = gathered == Operand::kP ? q.size(0) : p.size(0);
  const WeightGradChoice choice =
      choose_weight_grad(m, n, num_rows / num_experts, gathered == Operand::kQ);
  dispatch_half(p.scalar_type(),
                [&](auto type) { launch_weight_grad<decltype(type)>(problem, choice); });
}

}  // namespace moeops::cuda::hopper
