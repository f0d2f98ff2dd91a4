// What the gradients of grouped_linear and of moe_mlp share.
#pragma once

#include <vector>

#include "cpu/plan.h"
#include "cpu/products.h"

namespace moeops::cpu {

// Some rows of one expert's weight gradient, a task of a thread.
struct WeightTile {
  int64_t expert;
  int64_t first, count;
};

// The gradients [E, height, ...] of the experts for which wanted(e) holds, in tiles; those that sum
// over most rows first, for Tasks.
std::vector<WeightTile> weight_tiles(const Offsets& offsets, int64_t height,
                                     const std::vector<bool>& wanted);

// out[c] = the sum of column `first` + c over the rows of the contiguous `rows`, each row times its
// weight where there is one (accumulate type); c from 0 to `count`.
void sum_columns(const Matrix& rows, const void* row_weights, int64_t first, int64_t count,
                 void* out);

}  // namespace moeops::cpu
