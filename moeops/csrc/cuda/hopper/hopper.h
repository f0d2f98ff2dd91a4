// Grouped products and the expert block on Hopper (compute capability 9.0), in own kernels over
// wgmma and the tensor memory accelerator. Everything they do not cover stays with the general
// kernels, behind the same functions.
#pragma once

#include <optional>

#include "common.h"
#include "grouped_linear.h"
#include "kernels/activation.cuh"

namespace moeops::cuda::hopper {

constexpr int64_t kMaxRows = int64_t{1} << 30;  // row numbers are int32, with room for a tile

// Why these kernels cannot take products of `type` on this device, or null. MOEOPS_KERNELS=general
// is such a reason; MOEOPS_KERNELS=hopper turns every reason into an error.
const char* refusal(const Tensor& like);
// The same for rows [R, D] as they lie in memory, for weights [E, H, D] of any strides, for widths
// of matrices, and for biases.
const char* rows_refusal(const Tensor& rows);
const char* weight_refusal(const Tensor& weight);
const char* width_refusal(int64_t width);
const char* bias_refusal(const std::optional<Tensor>& bias);

// True where every reason is null. With MOEOPS_KERNELS=hopper a reason is an error of `op`.
bool takes(const char* op, std::initializer_list<const char*> reasons);

// The rows of x in expert order: row r is x[row_to_pair[r] / top_k].
struct Gather {
  const Tensor& row_to_pair;
  int64_t top_k, num_pairs;
};

// rows [R, D], weight [E, H, D] -> [R, H] (+ bias [E, H]). Rows past the last offset are not
// written.
Tensor matmul(const char* product, const Tensor& rows, const Tensor& weight, const RowPlan& plan,
              const std::optional<Tensor>& bias, cudaStream_t stream);

// hidden [R, H] = act(pre), pre [R, 2H or H] = x[tokens] w_up (+ b_up), rounded. `pre` may be
// undefined: then it is not written.
void up(const Tensor& x, const Gather& gather, const Tensor& w_up,
        const std::optional<Tensor>& b_up, Activation activation, const GluConstants<double>& unit,
        const RowPlan& plan, Tensor& pre, Tensor& hidden, cudaStream_t stream);

// grad_pre [R, 2H or H], weighted_hidden [R, H] and partial [R, tiles] of <grad_hidden, act(pre)>,
// from grad_y [T, D] and w_down [E, D, H]. Outputs may be undefined. Returns the tiles of partial:
// call with a null `partial` first.
struct DownBackward {
  const Tensor &grad_y, &w_down, &pre, &topk_weights;
  Tensor grad_pre, weighted_hidden, partial;
};
int64_t down_backward_tiles(const Tensor& w_down, Activation activation, const RowPlan& plan,
                            int64_t num_rows);
void down_backward(DownBackward& problem, const Gather& gather, Activation activation,
                   const GluConstants<double>& unit, const RowPlan& plan, cudaStream_t stream);

// out [E, m, n] = sum over an expert's rows of p [., m] x q [., n]; at most one of them gathered.
enum class Operand { kNone, kP, kQ };
void weight_grad(const char* product, const Tensor& p, const Tensor& q, Operand gathered,
                 const Gather* gather, const RowPlan& plan, Tensor& out, cudaStream_t stream);

}  // namespace moeops::cuda::hopper
