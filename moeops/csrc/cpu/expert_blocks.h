// The live rows of a plan cut into blocks of one expert each, the tasks of the expert kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/plan.h"

namespace moeops::cpu {

// A block's rows, as wide as any of the kernel's, should stay in the second cache level between its
// products; fewer rows would read an expert's weights too often.
constexpr int64_t kBlockRows = 256;
struct ExpertBlock {
  int64_t expert;
  int64_t begin, end;  // rows
  bool whole;          // holds every row of its expert

  int64_t size() const { return end - begin; }
};

// Every live row once, experts without rows as an empty block; longest first, for Tasks. The cut
// depends on the offsets alone, so that results do not depend on the number of threads.
inline std::vector<ExpertBlock> expert_blocks(const Offsets& offsets) {
  std::vector<ExpertBlock> blocks;
  blocks.reserve(offsets.num_experts);
  for (int64_t e = 0; e < offsets.num_experts; ++e) {
    const int64_t first = offsets.begin(e), rows = offsets.size(e);
    const int64_t parts = std::max<int64_t>(1, (rows + kBlockRows - 1) / kBlockRows);
    for (int64_t part = 0; part < parts; ++part) {
      blocks.push_back(
          {e, first + rows * part / parts, first + rows * (part + 1) / parts, parts == 1});
    }
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const ExpertBlock& a, const ExpertBlock& b) { return a.size() > b.size(); });
  return blocks;
}

}  // namespace moeops::cpu
