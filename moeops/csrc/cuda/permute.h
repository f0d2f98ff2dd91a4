// Permute and unpermute on CUDA, for the ops and for the expert block. Arguments are checked and
// contiguous.
#pragma once

#include "common.h"

namespace moeops::cuda {

// x [T, D] -> rows [R, D], zero behind the live ones
void permute(const Tensor& x, const Tensor& pair_to_row, const Tensor& offsets, Tensor& rows,
             cudaStream_t stream);

// rows [R, D] -> y [T, D]; topk_weights [T, K] in the accumulate type, or undefined for ones
void unpermute(const Tensor& rows, const std::optional<Tensor>& topk_weights,
               const Tensor& pair_to_row, const Tensor& offsets, Tensor& y, cudaStream_t stream);

}  // namespace moeops::cuda
