"""How much each expert is wanted. T tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.ops._library import LIBRARY, refuse_second_gradient
from moeops.ops.routing import SCORES


@torch.library.register_fake("moeops::score_sums")
def _score_sums_fake(logits, **_options):
    fake_check(logits.dim() == 2, "score_sums: logits must have 2 dimensions. Reshape them first.")
    return logits.new_empty((logits.shape[1],), dtype=_checks.accumulate_dtype(logits.dtype))


@torch.library.register_fake("moeops::score_sums_backward")
def _score_sums_backward_fake(grad_sums, logits, **_options):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _score_sums_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _score_sums_grad(ctx, grad_sums):
    if grad_sums is None:
        return None
    return torch.ops.moeops.score_sums_backward(grad_sums, *ctx.saved_tensors, **ctx.options)


torch.library.register_autograd(
    "moeops::score_sums", _score_sums_grad, setup_context=_score_sums_setup, lib=LIBRARY
)
refuse_second_gradient("score_sums_backward")


def score_sums(logits: Tensor, *, score: str = "softmax") -> Tensor:
    """Sum over the tokens each expert's share of the token's scores, without writing the shares.

    ``sums_e = sum_t s_te / sum_j s_tj`` with ``s = softmax(logits)``, whose shares are itself, or
    ``s = sigmoid(logits)``; divided by ``T`` this is the mean router probability of every balance loss. Sigmoids
    that all round to 0 still have shares.

    Args:
        logits: router logits, ``[T, E]``, any float type; computed in float32 (float64 for float64). On CUDA ``E`` is
            at most 2048.
        score: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``[E]`` float32 (float64 for float64 logits); 0 for no tokens, NaN if a logit is NaN or plus infinity.

    Raises:
        ValueError: a shape or ``score`` does not fit.  TypeError: ``logits`` is not float.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.  Cost: reads the logits once.
    Source: the ``P_e`` of the Switch Transformer, arXiv:2101.03961, equation 6; of sigmoids: DeepSeek-V3,
    arXiv:2412.19437, equation 20.

    Example:
        >>> score_sums(torch.zeros(4, 2)).tolist()
        [2.0, 2.0]
    """
    if not torch.compiler.is_compiling():
        op = "score_sums"
        _checks.check_tensor(op, "logits", logits, 2)
        _checks.check_float(op, "logits", logits)
        if score not in SCORES:
            raise ValueError(
                f"{op}: score must be one of {SCORES}, got {score!r}. Pick one of them."
            )
    return torch.ops.moeops.score_sums(logits, score=score)


@torch.library.register_fake("moeops::alignment_sum")
def _alignment_sum_fake(logits, topk_ids, experts_per_group):
    fake_check(
        logits.shape[0] == topk_ids.shape[0],
        "alignment_sum: topk_ids must have one row per token. Pass those of the logits.",
    )
    return logits.new_empty((), dtype=_checks.accumulate_dtype(logits.dtype))


@torch.library.register_fake("moeops::alignment_sum_backward")
def _alignment_sum_backward_fake(grad_sum, logits, topk_ids, experts_per_group):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _alignment_sum_setup(ctx, inputs, output):
    logits, topk_ids, ctx.experts_per_group = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, topk_ids)


def _alignment_sum_grad(ctx, grad_sum):
    if grad_sum is None:
        return None, None, None
    grad_logits = torch.ops.moeops.alignment_sum_backward(
        grad_sum, *ctx.saved_tensors, ctx.experts_per_group
    )
    return grad_logits, None, None


torch.library.register_autograd(
    "moeops::alignment_sum", _alignment_sum_grad, setup_context=_alignment_sum_setup, lib=LIBRARY
)
refuse_second_gradient("alignment_sum_backward")


def alignment_sum(logits: Tensor, topk_ids: Tensor, experts_per_group: int) -> Tensor:
    """Sum over the tokens by how much experts outside the chosen group beat the last choice.

    ``sum_t sum over the experts e outside the group of max(0, p_te - p_t,last)`` with ``p = softmax(logits)``, which is
    never written: ``T`` times ``moeops.losses.alignment_loss``.

    Args:
        logits: router logits, ``[T, E]``, any float type; computed in float32 (float64 for float64). On CUDA ``E`` is
            at most 2048.
        topk_ids: ``[T, K]`` int32 or int64, best first, all of a row in one group; -1 in the first or the last column
            leaves the token out.
        experts_per_group: a plain int; expert ``e`` is in group ``e // experts_per_group``.

    Returns:
        A float32 scalar (float64 for float64 logits); 0 for no tokens.

    Raises:
        ValueError: a shape or ``experts_per_group`` does not fit.  TypeError: a dtype is wrong.  RuntimeError: an id is
        out of range (checked on CPU; on CUDA such a token is left out).
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.  Cost: reads the logits once.
    Source: Switch and Mixture, arXiv:2110.07431.

    Example:
        >>> alignment_sum(torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log(), torch.tensor([[0, 1]]), 2)
        tensor(0.3000)
    """
    if not torch.compiler.is_compiling():
        op = "alignment_sum"
        _checks.check_tensor(op, "logits", logits, 2)
        _checks.check_float(op, "logits", logits)
        _checks.check_ids(op, "topk_ids", topk_ids)
        _checks.check_size(op, "topk_ids", topk_ids, 0, logits.shape[0], "one row per token")
        _checks.check_int(
            op, "experts_per_group", experts_per_group, 1, "Pass the experts per group."
        )
    return torch.ops.moeops.alignment_sum(logits, topk_ids.to(torch.int64), experts_per_group)
