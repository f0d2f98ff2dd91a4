// Grouped matrix products on CUDA, for the ops and for the expert block. Arguments are checked by
// the callers.
#pragma once

#include "common.h"

namespace moeops::cuda {

// Expert boundaries that are safe to index with, whatever the caller passed: [E + 1] int32.
Tensor safe_offsets(const Tensor& offsets, int64_t num_rows, cudaStream_t stream);

// rows [R, D] (contiguous), weight [E, H, D] (any strides) -> [R, H]; rows past the last offset are
// not written.
Tensor grouped_matmul(const Tensor& rows, const Tensor& weight, const Tensor& safe_offsets,
                      cudaStream_t stream);

// grad [R, H], rows [R, D] (both contiguous) -> [E, H, D]
Tensor grouped_weight_grad(const Tensor& grad, const Tensor& rows, const Tensor& safe_offsets,
                           cudaStream_t stream);

// rows [R, H] -> [E, H]
Tensor grouped_row_sum(const Tensor& rows, const Tensor& safe_offsets, cudaStream_t stream);

// x [T, D] -> [E, D]: the sum over an expert's pairs of topk_weights[pair] * x[pair / K]
Tensor grouped_weighted_sum(const Tensor& x, const Tensor& topk_weights, const Tensor& row_to_pair,
                            const Tensor& safe_offsets, cudaStream_t stream);

// rows [R, H]: rows past the last offset become zero
void zero_tail(Tensor& rows, const Tensor& safe_offsets, cudaStream_t stream);

}  // namespace moeops::cuda
