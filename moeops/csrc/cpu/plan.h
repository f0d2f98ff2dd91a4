// expert_offsets and the index maps of a TokenPlan, read on the CPU with every value checked, so
// that kernels can index with them blindly.
#pragma once

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "cpu/parallel.h"

namespace moeops::cpu {

// Expert e owns rows [begin(e), end(e)); rows from num_live on belong to no expert.
struct Offsets {
  Tensor holder;
  const int32_t* data;
  int64_t num_experts;
  int64_t num_live;

  int64_t begin(int64_t e) const { return data[e]; }
  int64_t end(int64_t e) const { return data[e + 1]; }
  int64_t size(int64_t e) const { return end(e) - begin(e); }
  // The expert that owns `row`, which is live.
  int64_t expert_of(int64_t row) const {
    const int32_t* ends = data + 1;
    return std::upper_bound(ends, ends + num_experts, static_cast<int32_t>(row)) - ends;
  }
};

inline Offsets read_offsets(const char* op, const Tensor& offsets, const Tensor& like,
                            int64_t num_rows) {
  check_offsets(op, offsets, like);
  Tensor holder = as_contiguous(offsets);
  const auto* data = static_cast<const int32_t*>(holder.const_data_ptr());
  const int64_t num_experts = offsets.size(0) - 1;
  STD_TORCH_CHECK(data[0] == 0, op, ": expert_offsets must start with 0, got ", data[0],
                  " at [0]. Build it with sort_tokens.");
  for (int64_t e = 0; e < num_experts; ++e) {
    STD_TORCH_CHECK(data[e + 1] >= data[e], op, ": expert_offsets must not fall, got ", data[e + 1],
                    " at [", e + 1, "] after ", data[e], ". Build it with sort_tokens.");
  }
  STD_TORCH_CHECK(data[num_experts] <= num_rows, op, ": expert_offsets must end at or below the ",
                  num_rows, " rows, got ", data[num_experts], " at [", num_experts,
                  "]. Build it with sort_tokens.");
  return {holder, data, num_experts, data[num_experts]};
}

// Once this exists, the live rows and their pairs name each other, and every other pair names no
// live row. What the rows behind the live ones hold in row_to_pair was not looked at.
struct Plan {
  Tensor row_holder;
  Tensor pair_holder;
  const int32_t* row_to_pair;
  const int32_t* pair_to_row;
  Offsets offsets;
  int64_t num_tokens;
  int64_t top_k;
  int64_t num_rows;

  int64_t num_pairs() const { return num_tokens * top_k; }
};

inline Plan read_plan(const char* op, const Tensor& row_to_pair, const Tensor& pair_to_row,
                      const Tensor& expert_offsets, const Tensor& like) {
  check_plan(op, row_to_pair, pair_to_row, expert_offsets, like);
  Plan plan{as_contiguous(row_to_pair),
            as_contiguous(pair_to_row),
            nullptr,
            nullptr,
            read_offsets(op, expert_offsets, like, row_to_pair.numel()),
            pair_to_row.size(0),
            pair_to_row.size(1),
            row_to_pair.numel()};
  plan.row_to_pair = static_cast<const int32_t*>(plan.row_holder.const_data_ptr());
  plan.pair_to_row = static_cast<const int32_t*>(plan.pair_holder.const_data_ptr());

  const int64_t num_pairs = plan.num_pairs(), live = plan.offsets.num_live;
  FirstError bad_pair, bad_inverse, bad_row;
  torch::stable::parallel_for(0, live, kGrainElements, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t pair = plan.row_to_pair[row];
      if (pair < 0 || pair >= num_pairs) {
        bad_pair.report(row);
      } else if (plan.pair_to_row[pair] != row) {
        bad_inverse.report(row);
      }
    }
  });
  torch::stable::parallel_for(0, num_pairs, kGrainElements, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t row = plan.pair_to_row[pair];
      if (row < 0 || (row < live && plan.row_to_pair[row] != pair)) bad_row.report(pair);
    }
  });
  STD_TORCH_CHECK(!bad_pair.found(), op, ": row_to_pair must be in [0, ", num_pairs, "), got ",
                  plan.row_to_pair[bad_pair.position()], " at [", bad_pair.position(),
                  "]. Build it with sort_tokens.");
  STD_TORCH_CHECK(!bad_inverse.found(), op,
                  ": pair_to_row must be the inverse of row_to_pair, got row ",
                  plan.pair_to_row[plan.row_to_pair[bad_inverse.position()]], " for pair ",
                  plan.row_to_pair[bad_inverse.position()], " of row ", bad_inverse.position(),
                  ". Build both with sort_tokens.");
  STD_TORCH_CHECK(!bad_row.found(), op,
                  ": pair_to_row must name the row that holds the pair, or none below ", live,
                  " for a dropped one, got row ", plan.pair_to_row[bad_row.position()],
                  " for pair ", bad_row.position(), ". Build it with sort_tokens.");
  return plan;
}

}  // namespace moeops::cpu
