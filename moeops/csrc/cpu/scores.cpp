// score_sums, alignment_sum and their backwards on the CPU. One thread owns a range of tokens and
// works through each token's logits in scratch memory of its own.
#include "cpu/scores.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"
#include "dispatch.h"
#include "text.h"

namespace moeops::cpu {
namespace {

void check_logits(const char* op, const Tensor& logits, const Text& score) {
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  check_score(op, score);
}

Tensor score_sums(const Tensor& logits, const Text& score) {
  constexpr const char* kOp = "score_sums";
  check_logits(kOp, logits, score);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const Tensor source = as_contiguous(logits);
  Tensor out =
      torch::stable::new_zeros(logits, {num_experts}, accumulate_type(logits.scalar_type()));
  if (logits.numel() == 0) return out;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    auto* total = static_cast<acc_t*>(out.mutable_data_ptr());
    const int64_t num_chunks = (num_tokens + kTokensPerSum - 1) / kTokensPerSum;
    const Ranges ranges(num_chunks, grain_rows(kTokensPerSum * num_experts));
    std::vector<acc_t> partial(num_chunks * num_experts, acc_t(0));
    std::vector<acc_t> values(ranges.count() * num_experts * 2);  // per range: logits, powers
    with_score(score, [&](auto sigmoid) {
      ranges.run([&](int64_t range, int64_t begin, int64_t end) {
        acc_t* z = values.data() + range * num_experts * 2;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t first = chunk * kTokensPerSum;
          const int64_t last = std::min(num_tokens, first + kTokensPerSum);
          for (int64_t t = first; t < last; ++t) {
            add_shares(sigmoid, data + t * num_experts, z, z + num_experts,
                       partial.data() + chunk * num_experts, num_experts);
          }
        }
      });
    });
    std::vector<double> sums(num_experts, 0.0);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      for (int64_t e = 0; e < num_experts; ++e) sums[e] += partial[chunk * num_experts + e];
    }
    for (int64_t e = 0; e < num_experts; ++e) total[e] = static_cast<acc_t>(sums[e]);
  });
  return out;
}

Tensor score_sums_backward(const Tensor& grad_sums, const Tensor& logits, const Text& score) {
  constexpr const char* kOp = "score_sums_backward";
  check_logits(kOp, logits, score);
  check_dim(kOp, "grad_sums", grad_sums, 1);
  check_size(kOp, "grad_sums", grad_sums, 0, logits.size(1));
  check_type(kOp, "grad_sums", grad_sums, accumulate_type(logits.scalar_type()),
             "float32 (float64 for float64 logits)");
  check_same_device(kOp, "grad_sums", grad_sums, logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const Tensor source = as_contiguous(logits), grad = as_contiguous(grad_sums);
  Tensor out = torch::stable::new_empty(logits, logits.sizes());
  if (logits.numel() == 0) return out;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    const auto* g = static_cast<const acc_t*>(grad.const_data_ptr());
    auto* target = static_cast<scalar_t*>(out.mutable_data_ptr());
    const Ranges ranges(num_tokens, grain_rows(num_experts));
    // Per range: logits, powers, slopes.
    std::vector<acc_t> values(ranges.count() * num_experts * 3);
    with_score(score, [&](auto sigmoid) {
      ranges.run([&](int64_t range, int64_t begin, int64_t end) {
        acc_t* scratch = values.data() + range * num_experts * 3;
        for (int64_t t = begin; t < end; ++t) {
          share_grads(sigmoid, g, data + t * num_experts, scratch, num_experts,
                      target + t * num_experts);
        }
      });
    });
  });
  return out;
}

// The sum of what the probabilities have above `bound`; `above` is raised by their number.
template <typename acc_t>
MOEOPS_WIDEST_VECTORS acc_t excess_of(const acc_t* probs, int64_t count, acc_t bound,
                                      int64_t& above) {
  acc_t sum = 0;
  int32_t number = 0;
#pragma omp simd reduction(+ : sum, number)
  for (int64_t e = 0; e < count; ++e) {
    const bool below = probs[e] <= bound;  // NaN is not
    sum += below ? acc_t(0) : probs[e] - bound;
    number += below ? 0 : 1;
  }
  above += number;
  return sum;
}

// One token of alignment_sum: probabilities in `probs`, and what the experts outside the group of
// the first choice have above the last one.
template <typename acc_t>
struct Excess {
  acc_t sum = 0;
  int64_t above = 0;
  int64_t first = -1, last = -1;  // -1: dropped
  int64_t experts_per_group = 1;
  int64_t group_begin = 0, group_end = 0;  // of the first choice

  bool has(const acc_t* probs, int64_t e) const {
    return (e < group_begin || e >= group_end) && !(probs[e] <= probs[last]);
  }

  template <typename scalar_t>
  void find(const scalar_t* logits, const int64_t* ids, int64_t top_k, int64_t num_experts,
            acc_t* z, acc_t* probs) {
    load_row(logits, num_experts, z);
    softmax_row(z, probs, num_experts);
    first = ids[0];
    last = ids[top_k - 1];
    sum = 0;
    above = 0;
    if (first < 0 || last < 0) return;
    group_begin = first / experts_per_group * experts_per_group;
    group_end = group_begin + experts_per_group;
    const int64_t begin = std::min(group_begin, num_experts),
                  end = std::min(group_end, num_experts);
    sum = excess_of(probs, begin, probs[last], above) +
          excess_of(probs + end, num_experts - end, probs[last], above);
  }
};

// Whether both marks of a token are in [-1, E).
inline bool valid_marks(const int64_t* ids, int64_t top_k, int64_t num_experts) {
  const auto valid = [&](int64_t id) { return id >= -1 && id < num_experts; };
  return valid(ids[0]) && valid(ids[top_k - 1]);
}

void refuse_marks(const char* op, const FirstError& bad_token, int64_t num_experts) {
  STD_TORCH_CHECK(!bad_token.found(), op, ": topk_ids must be in [-1, ", num_experts,
                  "), got others for token ", bad_token.position(), ". Drop a pair with -1.");
}

Tensor alignment_sum(const Tensor& logits, const Tensor& topk_ids, int64_t experts_per_group) {
  constexpr const char* kOp = "alignment_sum";
  check_alignment(kOp, logits, topk_ids, experts_per_group);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const int64_t top_k = topk_ids.size(1);
  const Tensor source = as_contiguous(logits), ids = as_contiguous(topk_ids);
  Tensor out = torch::stable::new_zeros(logits, {}, accumulate_type(logits.scalar_type()));
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  FirstError bad_token;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    const int64_t num_chunks = (num_tokens + kTokensPerSum - 1) / kTokensPerSum;
    const Ranges ranges(num_chunks, grain_rows(kTokensPerSum * num_experts));
    std::vector<double> partial(num_chunks, 0.0);
    std::vector<acc_t> values(ranges.count() * num_experts * 2);  // per range: logits, powers
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      acc_t* z = values.data() + range * num_experts * 2;
      Excess<acc_t> excess;
      excess.experts_per_group = experts_per_group;
      for (int64_t t = begin * kTokensPerSum; t < std::min(num_tokens, end * kTokensPerSum); ++t) {
        if (!valid_marks(id_data + t * top_k, top_k, num_experts)) {
          bad_token.report(t);
          continue;
        }
        excess.find(data + t * num_experts, id_data + t * top_k, top_k, num_experts, z,
                    z + num_experts);
        partial[t / kTokensPerSum] += excess.sum;
      }
    });
    double sum = 0;
    for (const double part : partial) sum += part;
    *static_cast<acc_t*>(out.mutable_data_ptr()) = static_cast<acc_t>(sum);
  });
  refuse_marks(kOp, bad_token, num_experts);
  return out;
}

Tensor alignment_sum_backward(const Tensor& grad_sum, const Tensor& logits, const Tensor& topk_ids,
                              int64_t experts_per_group) {
  constexpr const char* kOp = "alignment_sum_backward";
  check_alignment(kOp, logits, topk_ids, experts_per_group);
  check_scalar_grad(kOp, "grad_sum", grad_sum, logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const int64_t top_k = topk_ids.size(1);
  const Tensor source = as_contiguous(logits), ids = as_contiguous(topk_ids);
  Tensor out = torch::stable::new_empty(logits, logits.sizes());
  const auto* id_data = static_cast<const int64_t*>(ids.const_data_ptr());
  FirstError bad_token;
  MOEOPS_DISPATCH_FLOAT(logits.scalar_type(), kOp, [&] {
    using acc_t = accumulate_t<scalar_t>;
    const auto* data = static_cast<const scalar_t*>(source.const_data_ptr());
    auto* target = static_cast<scalar_t*>(out.mutable_data_ptr());
    const acc_t grad = *static_cast<const acc_t*>(grad_sum.const_data_ptr());
    const Ranges ranges(num_tokens, grain_rows(num_experts));
    std::vector<acc_t> values(ranges.count() * num_experts * 2);  // per range: logits, powers
    ranges.run([&](int64_t range, int64_t begin, int64_t end) {
      acc_t* z = values.data() + range * num_experts * 2;
      acc_t* probs = z + num_experts;
      Excess<acc_t> excess;
      excess.experts_per_group = experts_per_group;
      for (int64_t t = begin; t < end; ++t) {
        scalar_t* row = target + t * num_experts;
        if (!valid_marks(id_data + t * top_k, top_k, num_experts)) {
          bad_token.report(t);
          continue;
        }
        excess.find(data + t * num_experts, id_data + t * top_k, top_k, num_experts, z, probs);
        const bool counts = excess.first >= 0 && excess.last >= 0;
        // The gradient with respect to the probabilities is 1 where there is an excess and minus
        // their number at the last choice; its mean under the probabilities is the excess itself.
        for (int64_t e = 0; e < num_experts; ++e) {
          acc_t slope = 0;
          if (counts) {
            slope = e == excess.last ? -static_cast<acc_t>(excess.above)
                                     : static_cast<acc_t>(excess.has(probs, e));
          }
          row[e] = static_cast<scalar_t>(counts ? grad * probs[e] * (slope - excess.sum) : 0);
        }
      }
    });
  });
  refuse_marks(kOp, bad_token, num_experts);
  return out;
}

}  // namespace
}  // namespace moeops::cpu

STABLE_TORCH_LIBRARY_IMPL(moeops, CPU, m) {
  m.impl("score_sums", TORCH_BOX(&moeops::cpu::score_sums));
  m.impl("score_sums_backward", TORCH_BOX(&moeops::cpu::score_sums_backward));
  m.impl("alignment_sum", TORCH_BOX(&moeops::cpu::alignment_sum));
  m.impl("alignment_sum_backward", TORCH_BOX(&moeops::cpu::alignment_sum_backward));
}
