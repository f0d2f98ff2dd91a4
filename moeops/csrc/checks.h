// Host-side checks shared by the CPU and CUDA kernels. They repeat whatever would corrupt memory,
// so that a bare torch.ops.moeops call is as safe as the public function. Messages follow
// "<op>: <argument> must be <requirement>, got <what was got>. <what to do>".
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

namespace moeops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "[4, 8]"
inline std::string shape_string(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// Type that half types, and only they, leave for sums and routing weights.
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ",
                  shape_string(t), ". Reshape it.");
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim,
                       int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, op, ": ", name, " must have size ", size, " in dimension ",
                  dim, ", got shape ", shape_string(t), ". Check the arguments it has to fit.");
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_float(t.scalar_type()), op, ": ", name,
                  " must be float64, float32, bfloat16 or float16, got ", t.scalar_type(),
                  ". Cast it.");
}

inline void check_type(const char* op, const char* name, const Tensor& t, ScalarType type,
                       const char* type_name) {
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " must be ", type_name, ", got ",
                  t.scalar_type(), ". Cast it.");
}

inline void check_same_type(const char* op, const char* name, const Tensor& t,
                            const char* like_name, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must be ",
                  like.scalar_type(), " like ", like_name, ", got ", t.scalar_type(),
                  ". Cast one of them.");
}

inline void check_same_device(const char* op, const char* name, const Tensor& t,
                              const Tensor& like) {
  STD_TORCH_CHECK(t.device() == like.device(), op, ": ", name,
                  " must be on the device of the first argument, got another device. Move it.");
}

inline void check_id_type(const char* op, const Tensor& ids) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long, op,
                  ": topk_ids must be int32 or int64, got ", ids.scalar_type(),
                  ". Cast it with topk_ids.to(torch.int32).");
  STD_TORCH_CHECK(ids.numel() < std::numeric_limits<int32_t>::max(), op,
                  ": topk_ids must hold fewer than 2^31 pairs, got ", ids.numel(),
                  ". Split the tokens into several calls.");
}

inline void check_ids(const char* op, const Tensor& ids) {
  check_dim(op, "topk_ids", ids, 2);
  check_id_type(op, ids);
}

// Rows of a plan: what the caller asked for, or one for each pair. A row number is an int32.
inline int64_t plan_rows(const char* op, const std::optional<int64_t>& num_rows,
                         int64_t num_pairs) {
  if (!num_rows) return num_pairs;
  STD_TORCH_CHECK(*num_rows >= 0 && *num_rows < std::numeric_limits<int32_t>::max(), op,
                  ": num_rows must be from 0 to 2^31 - 2, got ", *num_rows,
                  ". Pass an upper bound of the pairs that are kept.");
  return *num_rows;
}

inline void check_num_experts(const char* op, int64_t num_experts) {
  STD_TORCH_CHECK(num_experts >= 1, op, ": num_experts must be at least 1, got ", num_experts,
                  ". Pass the number of experts.");
}

// The arguments of limit_capacity.
inline void check_limit(const char* op, const Tensor& ids, const std::optional<Tensor>& priority,
                        int64_t num_experts, int64_t capacity, bool by_choice) {
  check_ids(op, ids);
  check_num_experts(op, num_experts);
  STD_TORCH_CHECK(capacity >= 0, op, ": capacity must be at least 0, got ", capacity,
                  ". Pass rows per expert.");
  if (!priority) return;
  STD_TORCH_CHECK(!by_choice, op,
                  ": priority must be None with by_choice, got a tensor. Pass one.");
  check_dim(op, "priority", *priority, 2);
  check_float(op, "priority", *priority);
  check_same_device(op, "priority", *priority, ids);
  check_size(op, "priority", *priority, 0, ids.size(0));
  check_size(op, "priority", *priority, 1, ids.size(1));
}

inline void check_score(const char* op, const std::string& score) {
  STD_TORCH_CHECK(score == "softmax" || score == "sigmoid", op,
                  ": score must be 'softmax' or 'sigmoid', got '", score, "'. Pick one of them.");
}

// The choice of top_k experts among equal groups of which a token may use top_groups.
inline void check_route_options(const char* op, int64_t num_experts, int64_t top_k,
                                const std::string& score, int64_t num_groups, int64_t top_groups) {
  check_score(op, score);
  STD_TORCH_CHECK(num_groups >= 1 && num_experts >= 1 && num_experts % num_groups == 0, op,
                  ": num_groups must divide the ", num_experts, " experts, got ", num_groups,
                  ". Choose a divisor.");
  STD_TORCH_CHECK(top_groups >= 1 && top_groups <= num_groups, op,
                  ": top_groups must be from 1 to num_groups = ", num_groups, ", got ", top_groups,
                  ". Change it.");
  const int64_t reachable = num_experts / num_groups * top_groups;
  STD_TORCH_CHECK(top_k >= 1 && top_k <= reachable, op, ": top_k must be from 1 to the ", reachable,
                  " experts a token can reach, got ", top_k, ". Change it.");
}

// expert_offsets [E + 1] int32, contiguous, on the device of `like`.
inline void check_offsets(const char* op, const Tensor& offsets, const Tensor& like) {
  check_dim(op, "expert_offsets", offsets, 1);
  check_type(op, "expert_offsets", offsets, ScalarType::Int, "int32");
  check_same_device(op, "expert_offsets", offsets, like);
  STD_TORCH_CHECK(offsets.size(0) >= 2, op,
                  ": expert_offsets must have num_experts + 1 >= 2 entries, got ", offsets.size(0),
                  ". Build it with sort_tokens.");
}

// The three tensors of a TokenPlan, whose numbers of rows and of pairs are independent; values are
// the kernels' business.
inline void check_plan(const char* op, const Tensor& row_to_pair, const Tensor& pair_to_row,
                       const Tensor& offsets, const Tensor& like) {
  check_dim(op, "row_to_pair", row_to_pair, 1);
  check_dim(op, "pair_to_row", pair_to_row, 2);
  check_type(op, "row_to_pair", row_to_pair, ScalarType::Int, "int32");
  check_type(op, "pair_to_row", pair_to_row, ScalarType::Int, "int32");
  check_same_device(op, "row_to_pair", row_to_pair, like);
  check_same_device(op, "pair_to_row", pair_to_row, like);
  check_offsets(op, offsets, like);
}

// A contiguous tensor with the same values; the tensor itself where it is contiguous already.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace moeops
