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

// The type of sums and of routing weights: float32, which half types are widened to, or float64.
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

// A float vector of `size` values beside the logits, if there is one.
inline void check_optional_vector(const char* op, const char* name, const std::optional<Tensor>& t,
                                  int64_t size, const Tensor& logits) {
  if (!t) return;
  check_dim(op, name, *t, 1);
  check_float(op, name, *t);
  check_size(op, name, *t, 0, size);
  check_same_device(op, name, *t, logits);
}

// ids [T, K] int64 of the tokens of logits [T, E].
inline void check_ids_of_logits(const char* op, const Tensor& logits, const Tensor& topk_ids) {
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  check_ids(op, topk_ids);
  check_type(op, "topk_ids", topk_ids, ScalarType::Long, "int64");
  check_size(op, "topk_ids", topk_ids, 0, logits.size(0));
  check_same_device(op, "topk_ids", topk_ids, logits);
}

inline void check_alignment(const char* op, const Tensor& logits, const Tensor& topk_ids,
                            int64_t experts_per_group) {
  check_ids_of_logits(op, logits, topk_ids);
  STD_TORCH_CHECK(topk_ids.size(1) >= 1, op, ": topk_ids must have at least 1 column, got shape ",
                  shape_string(topk_ids), ". Pass the choices.");
  STD_TORCH_CHECK(
      experts_per_group >= 1 && experts_per_group <= std::numeric_limits<int32_t>::max(), op,
      ": experts_per_group must be from 1 to 2^31 - 1, got ", experts_per_group,
      ". Pass the experts per group.");
}

// The gradient of a scalar that was computed from the logits.
inline void check_scalar_grad(const char* op, const char* name, const Tensor& grad,
                              const Tensor& logits) {
  check_dim(op, name, grad, 0);
  check_type(op, name, grad, accumulate_type(logits.scalar_type()),
             "float32 (float64 for float64 logits)");
  check_same_device(op, name, grad, logits);
}

inline void check_temperature(const char* op, const std::optional<Tensor>& temperature,
                              const Tensor& logits) {
  if (!temperature) return;
  check_dim(op, "temperature", *temperature, 0);
  check_float(op, "temperature", *temperature);
  check_same_device(op, "temperature", *temperature, logits);
}

// Experts in equal groups, of each of which a token chooses one.
inline void check_prototypes(const char* op, const Tensor& logits, int64_t num_prototypes) {
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  const int64_t num_experts = logits.size(1);
  STD_TORCH_CHECK(
      num_prototypes >= 1 && num_experts >= num_prototypes && num_experts % num_prototypes == 0, op,
      ": num_prototypes must divide the ", num_experts, " experts, got ", num_prototypes,
      ". Choose a divisor.");
}

// The arguments of topk_route_balance.
inline void check_balance_arguments(const char* op, const Tensor& logits,
                                    const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& uniform,
                                    const std::optional<Tensor>& temperature, int64_t top_k,
                                    const std::string& score, int64_t num_groups,
                                    int64_t top_groups, const std::string& group_score,
                                    int64_t num_counted) {
  check_dim(op, "logits", logits, 2);
  check_float(op, "logits", logits);
  check_route_options(op, logits.size(1), top_k, score, num_groups, top_groups);
  check_optional_vector(op, "bias", bias, logits.size(1), logits);
  check_optional_vector(op, "uniform", uniform, logits.size(0), logits);
  check_temperature(op, temperature, logits);
  STD_TORCH_CHECK(!uniform || (score == "softmax" && !bias && num_groups == 1), op,
                  ": uniform must be None unless the score is a softmax without bias and groups, "
                  "got a tensor. Drop one of them.");
  STD_TORCH_CHECK(group_score == "top2" || group_score == "sum", op,
                  ": group_score must be \"top2\" or \"sum\", got \"", group_score,
                  "\". Pick one of them.");
  STD_TORCH_CHECK(num_counted >= 0 && num_counted <= top_k, op,
                  ": num_counted must be from 0 to top_k = ", top_k, ", got ", num_counted,
                  ". Change it.");
}

// Gradients of weights [T, K], sums [E] and loss, each of which may be missing, and counts [E].
inline void check_balance_grads(const char* op, const std::optional<Tensor>& grad_topk_weights,
                                const std::optional<Tensor>& grad_sums,
                                const std::optional<Tensor>& grad_loss, const Tensor& logits,
                                int64_t top_k, const Tensor& tokens_per_expert) {
  constexpr auto kTypeName = "float32 (float64 for float64 logits)";
  check_dim(op, "tokens_per_expert", tokens_per_expert, 1);
  check_type(op, "tokens_per_expert", tokens_per_expert, ScalarType::Int, "int32");
  check_size(op, "tokens_per_expert", tokens_per_expert, 0, logits.size(1));
  check_same_device(op, "tokens_per_expert", tokens_per_expert, logits);
  const ScalarType acc = accumulate_type(logits.scalar_type());
  if (grad_topk_weights) {
    check_dim(op, "grad_topk_weights", *grad_topk_weights, 2);
    check_size(op, "grad_topk_weights", *grad_topk_weights, 0, logits.size(0));
    check_size(op, "grad_topk_weights", *grad_topk_weights, 1, top_k);
    check_type(op, "grad_topk_weights", *grad_topk_weights, acc, kTypeName);
    check_same_device(op, "grad_topk_weights", *grad_topk_weights, logits);
  }
  check_optional_vector(op, "grad_sums", grad_sums, logits.size(1), logits);
  if (grad_sums) check_type(op, "grad_sums", *grad_sums, acc, kTypeName);
  if (grad_loss) check_scalar_grad(op, "grad_loss", *grad_loss, logits);
}

// The tensors that noisy logits are made of: [T, E], all alike.
inline void check_noisy(const char* op, const Tensor& clean, const Tensor& spread,
                        const Tensor& noise, double min_noise) {
  check_dim(op, "clean", clean, 2);
  check_float(op, "clean", clean);
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_dim(op, name, t, 2);
    check_same_type(op, name, t, "clean", clean);
    check_size(op, name, t, 0, clean.size(0));
    check_size(op, name, t, 1, clean.size(1));
    check_same_device(op, name, t, clean);
  };
  check_like("spread", spread);
  check_like("noise", noise);
  STD_TORCH_CHECK(min_noise > 0, op, ": min_noise must be above 0, got ", min_noise,
                  ". The load divides by the noise: use 0.01.");
}

inline void check_noisy_grads(const char* op, const std::optional<Tensor>& grad_topk_weights,
                              const std::optional<Tensor>& grad_importance,
                              const std::optional<Tensor>& grad_load,
                              const std::optional<Tensor>& grad_loss, const Tensor& clean,
                              const Tensor& topk_ids, const Tensor& runner_up,
                              const Tensor& importance, const Tensor& load) {
  constexpr auto kTypeName = "float32 (float64 for float64 logits)";
  const ScalarType acc = accumulate_type(clean.scalar_type());
  check_ids_of_logits(op, clean, topk_ids);
  check_dim(op, "runner_up", runner_up, 1);
  check_type(op, "runner_up", runner_up, ScalarType::Long, "int64");
  check_size(op, "runner_up", runner_up, 0, clean.size(0));
  check_same_device(op, "runner_up", runner_up, clean);
  if (grad_topk_weights) {
    check_dim(op, "grad_topk_weights", *grad_topk_weights, 2);
    check_size(op, "grad_topk_weights", *grad_topk_weights, 0, topk_ids.size(0));
    check_size(op, "grad_topk_weights", *grad_topk_weights, 1, topk_ids.size(1));
    check_type(op, "grad_topk_weights", *grad_topk_weights, acc, kTypeName);
    check_same_device(op, "grad_topk_weights", *grad_topk_weights, clean);
  }
  const auto check_sums = [&](const char* name, const std::optional<Tensor>& t) {
    check_optional_vector(op, name, t, clean.size(1), clean);
    if (t) check_type(op, name, *t, acc, kTypeName);
  };
  check_sums("grad_importance", grad_importance);
  check_sums("grad_load", grad_load);
  check_sums("importance", importance);
  check_sums("load", load);
  if (grad_loss) check_scalar_grad(op, "grad_loss", *grad_loss, clean);
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

// topk_weights is [T, K] in the accumulate type of `type`.
inline void check_topk_weights(const char* op, const Tensor& topk_weights, ScalarType type,
                               const Tensor& pair_to_row) {
  check_dim(op, "topk_weights", topk_weights, 2);
  STD_TORCH_CHECK(topk_weights.scalar_type() == accumulate_type(type), op,
                  ": topk_weights must be float32, or float64 beside float64 rows, got ",
                  topk_weights.scalar_type(), ". Cast it.");
  check_same_device(op, "topk_weights", topk_weights, pair_to_row);
  check_size(op, "topk_weights", topk_weights, 0, pair_to_row.size(0));
  check_size(op, "topk_weights", topk_weights, 1, pair_to_row.size(1));
}

// A contiguous tensor with the same values; the tensor itself where it is contiguous already.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(as_contiguous(*t)) : t;
}

}  // namespace moeops
