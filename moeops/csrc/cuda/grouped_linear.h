// Grouped matrix products on CUDA, for the ops and for the expert block. Arguments are checked by
// the callers.
#pragma once

#include <optional>

#include "common.h"

namespace moeops::cuda {

// Which rows are whose, on the device. offsets [E + 1] int32 are safe to index with, whatever the
// caller passed. tiles [at most R / 128 + E, 4], followed by a row that begins with their number,
// cut the rows for the Hopper kernels (kernels/plan_rows.cuh); undefined where those do not run.
struct RowPlan {
  Tensor offsets, tiles;

  const int4* tile_table() const { return static_cast<const int4*>(tiles.data_ptr()); }
  const int32_t* num_tiles() const {
    return static_cast<const int32_t*>(tiles.data_ptr()) + 4 * (tiles.size(0) - 1);
  }
};
RowPlan plan_rows(const Tensor& offsets, int64_t num_rows, const Tensor& like, cudaStream_t stream);

// rows [R, D] (contiguous), weight [E, H, D] (any strides), bias [E, H] (contiguous) -> [R, H];
// rows past the last offset are not written. `op` is for errors.
Tensor grouped_matmul(const char* op, const Tensor& rows, const Tensor& weight, const RowPlan& plan,
                      const std::optional<Tensor>& bias, cudaStream_t stream);

// grad [R, H], rows [R, D] (both contiguous) -> [E, H, D]
Tensor grouped_weight_grad(const char* op, const Tensor& grad, const Tensor& rows,
                           const RowPlan& plan, cudaStream_t stream);

// rows [R, H] -> [E, H]
Tensor grouped_row_sum(const Tensor& rows, const Tensor& safe_offsets, cudaStream_t stream);

// x [T, D] -> [E, D]: the sum over an expert's pairs of topk_weights[pair] * x[pair / K]
Tensor grouped_weighted_sum(const Tensor& x, const Tensor& topk_weights, const Tensor& row_to_pair,
                            const Tensor& safe_offsets, cudaStream_t stream);

// rows [R, H]: rows past the last offset become zero
void zero_tail(Tensor& rows, const Tensor& safe_offsets, cudaStream_t stream);

}  // namespace moeops::cuda
