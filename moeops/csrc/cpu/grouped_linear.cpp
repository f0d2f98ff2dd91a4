// grouped_linear, its weight gradient and grouped_sum on the CPU. Blocks of an expert's rows, or
// tiles of its weight's gradient, are the tasks of the threads; each product is torch's own mm.
#include "cpu/grouped_linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "checks/grouped_linear.h"
#include "cpu/expert_blocks.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

// Columns of one task of a sum: a cache line or more per row, sums that fit the first cache level.
constexpr int64_t kSumColumns = 64;
// Rows summed before the partial sum moves to the total, which keeps float32 sums of many rows
// accurate.
constexpr int64_t kSumRows = 128;
// Rows of a weight gradient in one task: enough for mm to run at full speed.
constexpr int64_t kTileRows = 256;

// out [count] = the sum over `num_rows` rows, `stride` apart, of their first `count` columns, at
// most kSumColumns.
template <typename scalar_t>
MOEOPS_WIDEST_VECTORS void sum_column_block(const scalar_t* rows,
                                            const accumulate_t<scalar_t>* row_weights,
                                            int64_t num_rows, int64_t stride, int64_t count,
                                            scalar_t* out) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t total[kSumColumns] = {}, partial[kSumColumns];
  for (int64_t first = 0; first < num_rows; first += kSumRows) {
    std::fill(partial, partial + count, acc_t(0));
    for (int64_t row = first; row < std::min(num_rows, first + kSumRows); ++row) {
      const scalar_t* source = rows + row * stride;
      const acc_t weight = row_weights ? row_weights[row] : acc_t(1);
      for (int64_t i = 0; i < count; ++i) partial[i] += weight * static_cast<acc_t>(source[i]);
    }
    for (int64_t i = 0; i < count; ++i) total[i] += partial[i];
  }
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<scalar_t>(total[i]);
}

}  // namespace

std::vector<WeightTile> weight_tiles(const Offsets& offsets, int64_t height,
                                     const std::vector<bool>& wanted) {
  std::vector<WeightTile> tiles;
  for (int64_t e = 0; e < offsets.num_experts; ++e) {
    for (int64_t first = 0; wanted[e] && first < height; first += kTileRows) {
      tiles.push_back({e, first, std::min(kTileRows, height - first)});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [&](const WeightTile& a, const WeightTile& b) {
    return offsets.size(a.expert) > offsets.size(b.expert);
  });
  return tiles;
}

void sum_columns(const Matrix& rows, const void* row_weights, int64_t first, int64_t count,
                 void* out) {
  MOEOPS_DISPATCH_FLOAT(rows.type, "grouped_sum", [&] {
    const auto* source = reinterpret_cast<const scalar_t*>(rows.data) + first;
    const auto* weights = static_cast<const accumulate_t<scalar_t>*>(row_weights);
    auto* target = static_cast<scalar_t*>(out);
    for (int64_t column = 0; column < count; column += kSumColumns) {
      sum_column_block(source + column, weights, rows.rows, rows.row_stride,
                       std::min(kSumColumns, count - column), target + column);
    }
  });
}

namespace {

Tensor grouped_linear(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                      const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "grouped_linear";
  check_grouped_linear(kOp, rows, weight, expert_offsets, bias);
  const Offsets offsets = read_offsets(kOp, expert_offsets, rows, rows.size(0));
  const Tensor source = as_contiguous(rows);
  std::optional<Tensor> added;
  if (bias) added = as_contiguous(*bias);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), weight.size(1)});
  const std::vector<ExpertBlock> blocks = expert_blocks(offsets);
  Tasks(blocks.size()).run([&](int64_t, int64_t task) {
    const ExpertBlock& block = blocks[task];
    multiply(row_matrix(source, block.begin, block.size()),
             expert_matrix(weight, block.expert).transposed(),
             row_matrix(out, block.begin, block.size()), row_of(added, block.expert));
  });
  clear(row_matrix(out, offsets.num_live, rows.size(0) - offsets.num_live));
  return out;
}

Tensor grouped_linear_weight_grad(const Tensor& grad, const Tensor& rows,
                                  const Tensor& expert_offsets, bool transposed) {
  constexpr const char* kOp = "grouped_linear_weight_grad";
  check_weight_grad(kOp, grad, rows, expert_offsets);
  const Offsets offsets = read_offsets(kOp, expert_offsets, rows, rows.size(0));
  // What is stored is left.T @ right for each expert.
  const Tensor left = as_contiguous(transposed ? rows : grad);
  const Tensor right = as_contiguous(transposed ? grad : rows);
  Tensor out = torch::stable::new_empty(rows, {offsets.num_experts, left.size(1), right.size(1)});
  const std::vector<WeightTile> tiles = weight_tiles(
      offsets, left.size(1), std::vector<bool>(static_cast<size_t>(offsets.num_experts), true));
  Tasks(tiles.size()).run([&](int64_t, int64_t task) {
    const WeightTile& tile = tiles[task];
    const int64_t first = offsets.begin(tile.expert), count = offsets.size(tile.expert);
    multiply(row_matrix(left, first, count).transposed().row_range(tile.first, tile.count),
             row_matrix(right, first, count),
             expert_matrix(out, tile.expert).row_range(tile.first, tile.count));
  });
  return transposed ? torch::stable::transpose(out, 1, 2) : out;
}

Tensor grouped_sum(const Tensor& rows, const Tensor& expert_offsets) {
  constexpr const char* kOp = "grouped_sum";
  check_dim(kOp, "rows", rows, 2);
  check_float(kOp, "rows", rows);
  const Offsets offsets = read_offsets(kOp, expert_offsets, rows, rows.size(0));
  const Tensor source = as_contiguous(rows);
  Tensor out = torch::stable::new_empty(rows, {offsets.num_experts, rows.size(1)});
  const int64_t width = rows.size(1), parts = (width + kSumColumns - 1) / kSumColumns;
  torch::stable::parallel_for(0, offsets.num_experts * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t e = task / parts, first = task % parts * kSumColumns;
      sum_columns(row_matrix(source, offsets.begin(e), offsets.size(e)), nullptr, first,
                  std::min(kSumColumns, width - first),
                  row_matrix(out, e, 1).data + first * out.element_size());
    }
  });
  return out;
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&moeops::cpu::grouped_linear));
  m.impl("grouped_linear_weight_grad", TORCH_BOX(&moeops::cpu::grouped_linear_weight_grad));
  m.impl("grouped_sum", TORCH_BOX(&moeops::cpu::grouped_sum));
}
