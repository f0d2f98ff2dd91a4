// sort_tokens, count_tokens and limit_capacity on the CPU. A stable counting sort in two passes:
// every thread counts the experts of its range of pairs, a prefix sum over (expert, range) gives
// each range its first place, and every thread places its pairs in order.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"
#include "dispatch.h"

namespace moeops::cpu {
namespace {

// How many pairs of each expert lie before each range. Bucket E holds the dropped pairs.
class ExpertCounts {
 public:
  template <typename id_t>
  ExpertCounts(const char* op, const id_t* ids, int64_t num_pairs, int64_t num_experts,
               bool drop_out_of_range)
      : ranges(num_pairs, kGrainElements),
        num_buckets_(num_experts + 1),
        firsts_(ranges.count() * num_buckets_, 0),
        totals_(num_buckets_, 0) {
    FirstError bad_id;
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      int32_t* counts = firsts(range);
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t id = ids[pair];
        if (id < -1 || (id >= num_experts && !drop_out_of_range)) {
          bad_id.report(pair);
        } else {
          ++counts[bucket(id)];
        }
      }
    });
    STD_TORCH_CHECK(!bad_id.found(), op, ": topk_ids must be in [-1, ", num_experts, "), got ",
                    static_cast<int64_t>(ids[bad_id.position()]), " at pair ", bad_id.position(),
                    ". Drop a pair with -1, and check num_experts.");
    for (int64_t range = 0; range < ranges.count(); ++range) {
      int32_t* counts = firsts(range);
      for (int64_t e = 0; e < num_buckets_; ++e) {
        const int32_t count = counts[e];
        counts[e] = totals_[e];
        totals_[e] += count;
      }
    }
  }

  int64_t bucket(int64_t id) const { return id < 0 || id >= num_buckets_ ? num_buckets_ - 1 : id; }
  // Pairs of each bucket before this range; the range's owner counts them up while it works.
  int32_t* firsts(int64_t range) { return firsts_.data() + range * num_buckets_; }
  const std::vector<int32_t>& totals() const { return totals_; }

  Ranges ranges;

 private:
  int64_t num_buckets_;
  std::vector<int32_t> firsts_;
  std::vector<int32_t> totals_;
};

// Pairs in expert order. Returns the first row of every bucket; pair_to_row may be null. With fewer
// rows than pairs the dropped ones get none: `num_rows` stands in their pair_to_row.
template <typename id_t>
std::vector<int32_t> sort_pairs(ExpertCounts& counts, const id_t* ids, int64_t num_pairs,
                                int64_t num_rows, int32_t* row_to_pair, int32_t* pair_to_row) {
  std::vector<int32_t> starts(counts.totals().size());
  int32_t row = 0;
  for (size_t e = 0; e < starts.size(); ++e) {
    starts[e] = row;
    row += counts.totals()[e];
  }
  const auto dropped = static_cast<int64_t>(starts.size()) - 1;
  const int64_t rowless = num_rows < num_pairs ? dropped : dropped + 1;
  counts.ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    int32_t* firsts = counts.firsts(range);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t e = counts.bucket(ids[pair]);
      if (e == rowless) {
        if (pair_to_row) pair_to_row[pair] = static_cast<int32_t>(num_rows);
        continue;
      }
      const int32_t place = starts[e] + firsts[e]++;
      row_to_pair[place] = static_cast<int32_t>(pair);
      if (pair_to_row) pair_to_row[pair] = place;
    }
  });
  return starts;
}

// Runs the body with a pointer to the ids in their own type.
template <typename Body>
void with_ids(const Tensor& ids, const Body& body) {
  if (ids.scalar_type() == ScalarType::Int) {
    body(static_cast<const int32_t*>(ids.const_data_ptr()));
  } else {
    body(static_cast<const int64_t*>(ids.const_data_ptr()));
  }
}

void check_arguments(const char* op, const Tensor& topk_ids, int64_t num_experts) {
  check_ids(op, topk_ids);
  check_num_experts(op, num_experts);
}

std::tuple<Tensor, Tensor, Tensor> sort_tokens(const Tensor& topk_ids, int64_t num_experts,
                                               std::optional<int64_t> rows_asked,
                                               bool drop_out_of_range) {
  constexpr const char* kOp = "sort_tokens";
  check_arguments(kOp, topk_ids, num_experts);
  const Tensor ids = as_contiguous(topk_ids);
  const int64_t num_pairs = ids.numel();
  const int64_t num_rows = plan_rows(kOp, rows_asked, num_pairs);
  Tensor row_to_pair = torch::stable::new_empty(ids, {num_rows}, ScalarType::Int);
  Tensor pair_to_row = torch::stable::new_empty(ids, ids.sizes(), ScalarType::Int);
  Tensor expert_offsets = torch::stable::new_empty(ids, {num_experts + 1}, ScalarType::Int);
  with_ids(ids, [&](const auto* data) {
    ExpertCounts counts(kOp, data, num_pairs, num_experts, drop_out_of_range);
    const int64_t num_kept = num_pairs - counts.totals().back();
    STD_TORCH_CHECK(num_kept <= num_rows, kOp, ": num_rows must be at least the ", num_kept,
                    " pairs that are kept, got ", num_rows,
                    ". Raise it, or drop pairs with -1 in topk_ids.");
    auto* rows = static_cast<int32_t*>(row_to_pair.mutable_data_ptr());
    const std::vector<int32_t> starts =
        sort_pairs(counts, data, num_pairs, num_rows, rows,
                   static_cast<int32_t*>(pair_to_row.mutable_data_ptr()));
    // Rows without a pair name pair 0: readers index with it and ignore what they find.
    std::fill(rows + (num_rows < num_pairs ? num_kept : num_pairs), rows + num_rows, 0);
    std::copy(starts.begin(), starts.end(),
              static_cast<int32_t*>(expert_offsets.mutable_data_ptr()));
  });
  return {row_to_pair, pair_to_row, expert_offsets};
}

Tensor count_tokens(const Tensor& topk_ids, int64_t num_experts) {
  constexpr const char* kOp = "count_tokens";
  check_id_type(kOp, topk_ids);
  check_num_experts(kOp, num_experts);
  const Tensor ids = as_contiguous(topk_ids);
  Tensor tokens_per_expert = torch::stable::new_empty(ids, {num_experts}, ScalarType::Int);
  with_ids(ids, [&](const auto* data) {
    const ExpertCounts counts(kOp, data, ids.numel(), num_experts, /*drop_out_of_range=*/false);
    std::copy(counts.totals().begin(), counts.totals().end() - 1,
              static_cast<int32_t*>(tokens_per_expert.mutable_data_ptr()));
  });
  return tokens_per_expert;
}

// Whether pair a comes before pair b: NaN first, then the larger value, then the earlier pair, as
// torch.sort has it.
template <typename scalar_t>
struct ByPriority {
  const scalar_t* priority;
  bool operator()(int32_t a, int32_t b) const {
    using acc_t = accumulate_t<scalar_t>;
    const acc_t left = static_cast<acc_t>(priority[a]);
    const acc_t right = static_cast<acc_t>(priority[b]);
    const bool left_nan = std::isnan(left), right_nan = std::isnan(right);
    if (left_nan != right_nan) return left_nan;
    if (!left_nan && left != right) return left > right;
    return a < b;
  }
};

// First come, first served.
template <typename id_t>
void keep_first(id_t* out, const id_t* ids, ExpertCounts& counts, int64_t num_experts,
                int64_t capacity) {
  counts.ranges.run([&](int64_t range, int64_t begin, int64_t end) {
    int32_t* firsts = counts.firsts(range);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t e = counts.bucket(ids[pair]);
      const bool kept = e < num_experts && firsts[e]++ < capacity;
      out[pair] = kept ? ids[pair] : id_t(-1);
    }
  });
}

// The `capacity` pairs of each expert that come first by priority.
template <typename scalar_t, typename id_t>
void keep_best(id_t* out, const id_t* ids, const scalar_t* priority, ExpertCounts& counts,
               int64_t num_pairs, int64_t num_experts, int64_t capacity) {
  std::vector<int32_t> pairs(num_pairs);
  const std::vector<int32_t> starts =
      sort_pairs(counts, ids, num_pairs, num_pairs, pairs.data(), nullptr);
  std::copy(ids, ids + num_pairs, out);
  torch::stable::parallel_for(0, num_experts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      if (starts[e + 1] - starts[e] <= capacity) continue;
      const auto first = pairs.begin() + starts[e], last = pairs.begin() + starts[e + 1];
      const auto cut = first + capacity;
      std::nth_element(first, cut, last, ByPriority<scalar_t>{priority});
      for (auto pair = cut; pair != last; ++pair) out[*pair] = id_t(-1);
    }
  });
}

// The transpose of `kept [K, T]`.
template <typename id_t>
void transpose_back(id_t* out, const id_t* kept, int64_t num_tokens, int64_t top_k) {
  torch::stable::parallel_for(0, num_tokens, grain_rows(top_k), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < top_k; ++k) out[t * top_k + k] = kept[k * num_tokens + t];
    }
  });
}

Tensor limit_capacity(const Tensor& topk_ids, int64_t num_experts, int64_t capacity,
                      const std::optional<Tensor>& priority, bool by_choice) {
  constexpr const char* kOp = "limit_capacity";
  check_limit(kOp, topk_ids, priority, num_experts, capacity, by_choice);
  const int64_t num_tokens = topk_ids.size(0), top_k = topk_ids.size(1);
  const bool turned = by_choice && top_k > 1;
  const Tensor ids = as_contiguous(turned ? torch::stable::transpose(topk_ids, 0, 1) : topk_ids);
  const int64_t num_pairs = ids.numel();
  Tensor kept = torch::stable::new_empty(ids, ids.sizes());
  Tensor out = turned ? torch::stable::new_empty(ids, topk_ids.sizes()) : kept;
  with_ids(ids, [&](const auto* data) {
    using id_t = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    auto* kept_ids = static_cast<id_t*>(kept.mutable_data_ptr());
    ExpertCounts counts(kOp, data, num_pairs, num_experts, /*drop_out_of_range=*/false);
    if (!priority) {
      keep_first(kept_ids, data, counts, num_experts, capacity);
      if (turned) {
        transpose_back(static_cast<id_t*>(out.mutable_data_ptr()), kept_ids, num_tokens, top_k);
      }
      return;
    }
    const Tensor values = as_contiguous(*priority);
    MOEOPS_DISPATCH_FLOAT(values.scalar_type(), kOp, [&] {
      keep_best(kept_ids, data, static_cast<const scalar_t*>(values.const_data_ptr()), counts,
                num_pairs, num_experts, capacity);
    });
  });
  return out;
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("sort_tokens", TORCH_BOX(&moeops::cpu::sort_tokens));
  m.impl("count_tokens", TORCH_BOX(&moeops::cpu::count_tokens));
  m.impl("limit_capacity", TORCH_BOX(&moeops::cpu::limit_capacity));
}
