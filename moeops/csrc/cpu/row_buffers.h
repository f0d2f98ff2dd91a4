// Buffers of rows for the expert block's kernels.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/expert_blocks.h"
#include "cpu/products.h"

namespace moeops::cpu {

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

}  // namespace moeops::cpu
