"""From router logits to chosen experts. T tokens, E experts, K experts per token."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.ops._library import LIBRARY, refuse_second_gradient
from moeops.types import Route

SCORES = ("softmax", "sigmoid")


@torch.library.register_fake("moeops::topk_route")
def _topk_route_fake(logits, top_k, bias=None, **_options):
    fake_check(logits.dim() == 2, "topk_route: logits must have 2 dimensions. Reshape them first.")
    weights = logits.new_empty(
        (logits.shape[0], top_k), dtype=_checks.accumulate_dtype(logits.dtype)
    )
    return weights, logits.new_empty((logits.shape[0], top_k), dtype=torch.int64)


@torch.library.register_fake("moeops::topk_route_backward")
def _topk_route_backward_fake(grad_topk_weights, logits, topk_ids, **_options):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def weight_options(options):
    """The options of a routing op that say what its weights are."""
    return {name: options[name] for name in ("score", "renormalize", "scale")}


def _topk_route_setup(ctx, inputs, keyword_only_inputs, output):
    logits, *_ = inputs
    _, topk_ids = output
    ctx.mark_non_differentiable(topk_ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, topk_ids)
    ctx.options = weight_options(keyword_only_inputs)


def _topk_route_grad(ctx, grad_topk_weights, _grad_ids):
    if grad_topk_weights is None:
        return None, None, None
    grad_logits = torch.ops.moeops.topk_route_backward(
        grad_topk_weights, *ctx.saved_tensors, **ctx.options
    )
    return grad_logits, None, None


torch.library.register_autograd(
    "moeops::topk_route", _topk_route_grad, setup_context=_topk_route_setup, lib=LIBRARY
)
refuse_second_gradient("topk_route_backward")


def topk_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> Route:
    """Choose ``top_k`` experts per token and weight them by their scores, in one kernel.

    Scores are ``softmax(logits)`` over all experts or ``sigmoid(logits)``. The best ``top_k`` are chosen by score plus
    ``bias``, ties by lower id; the weights are the scores without the bias, divided by their sum if ``renormalize``,
    times ``scale``. With ``num_groups > 1`` only experts of the ``top_groups`` best groups can be chosen, a group
    being worth the sum of its two best biased scores.

    Args:
        logits: router logits, ``[T, E]``, any float type, finite; computed in float32 (float64 for float64).
        top_k: ``K``, from 1 to ``E`` (or to ``top_groups * E / num_groups``).
        score: ``"softmax"`` or ``"sigmoid"``.
        renormalize: divide the chosen scores by their sum; with softmax this is the softmax over the chosen logits.
        scale: factor on the weights.
        bias: ``[E]`` float, added to the scores for the choice only; gets no gradient.
        num_groups: number of equal expert groups, a divisor of ``E``.
        top_groups: groups a token may use, at most ``num_groups``.

    Returns:
        A Route: topk_weights ``[T, K]`` float32 (float64 for float64 logits) and topk_ids ``[T, K]`` int64, best first.

    Raises:
        ValueError: a shape, ``top_k``, ``score`` or the groups do not fit.  TypeError: ``logits`` is not float.
        RuntimeError: a logit is NaN or infinite (checked on CPU; on CUDA with ``MOEOPS_DEBUG_CHECKS=1``).
    Gradients: ``logits`` through the weights.  Host sync: none.  Deterministic: yes.
    Source: Shazeer et al. 2017, arXiv:1701.06538; groups and bias: DeepSeek-V3, arXiv:2412.19437.

    Example:
        >>> weights, ids = topk_route(torch.tensor([[0.0, 2.0, 1.0]]), 2)
        >>> ids.tolist()
        [[1, 2]]
    """
    if not torch.compiler.is_compiling():
        check_route("topk_route", logits, top_k, score, bias, num_groups, top_groups)
    return Route(
        *torch.ops.moeops.topk_route(
            logits,
            top_k,
            bias,
            score=score,
            renormalize=renormalize,
            scale=scale,
            num_groups=num_groups,
            top_groups=top_groups,
        )
    )


def check_route(
    op: str,
    logits: object,
    top_k: int,
    score: str,
    bias: object,
    num_groups: int,
    top_groups: int,
) -> None:
    """Check the arguments that routing ops have in common."""
    _checks.check_tensor(op, "logits", logits, 2)
    assert isinstance(logits, Tensor)
    _checks.check_float(op, "logits", logits)
    num_experts = logits.shape[1]
    _checks.check_int(op, "top_k", top_k, 1, "Choose 1 <= top_k <= num_experts.")
    _checks.check_int(op, "num_groups", num_groups, 1, "Use 1 for no groups.")
    _checks.check_int(op, "top_groups", top_groups, 1, "Use 1 for no groups.")
    if score not in SCORES:
        raise ValueError(f"{op}: score must be one of {SCORES}, got {score!r}. Pick one of them.")
    if num_experts == 0 or num_experts % num_groups != 0:
        raise ValueError(
            f"{op}: num_groups must divide the {num_experts} experts, got {num_groups}. Choose a divisor."
        )
    if top_groups > num_groups:
        raise ValueError(
            f"{op}: top_groups must be at most num_groups = {num_groups}, got {top_groups}. Lower it."
        )
    reachable = num_experts // num_groups * top_groups
    if top_k > reachable:
        raise ValueError(
            f"{op}: top_k must be at most the {reachable} experts a token can reach, got {top_k}. Lower top_k."
        )
    if bias is not None:
        _checks.check_tensor(op, "bias", bias, 1)
        assert isinstance(bias, Tensor)
        _checks.check_float(op, "bias", bias)
        _checks.check_size(op, "bias", bias, 0, num_experts, "one entry per expert")
        _checks.check_device(op, "bias", bias, "logits", logits)


@torch.library.register_fake("moeops::chosen_weights")
def _chosen_weights_fake(logits, topk_ids, **_options):
    fake_check(
        logits.shape[0] == topk_ids.shape[0],
        "chosen_weights: topk_ids must have one row per token. Pass those of the logits.",
    )
    return logits.new_empty(topk_ids.shape, dtype=_checks.accumulate_dtype(logits.dtype))


def _chosen_weights_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.options = weight_options(keyword_only_inputs)


def _chosen_weights_grad(ctx, grad_weights):
    if grad_weights is None:
        return None, None
    grad_logits = torch.ops.moeops.topk_route_backward(
        grad_weights, *ctx.saved_tensors, **ctx.options
    )
    return grad_logits, None


torch.library.register_autograd(
    "moeops::chosen_weights", _chosen_weights_grad, setup_context=_chosen_weights_setup, lib=LIBRARY
)


def chosen_weights(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Weigh experts that were chosen elsewhere as ``topk_route`` weighs those that it chooses.

    Args:
        logits: router logits, ``[T, E]``, any float type; computed in float32 (float64 for float64).
        topk_ids: ``[T, K]`` int32 or int64 in ``[-1, E)``, no expert twice in a row; a dropped slot gets 0, and the
            others are renormalised alone.
        score: ``"softmax"`` or ``"sigmoid"``.
        renormalize: divide the chosen scores by their sum.
        scale: factor on the weights.

    Returns:
        ``[T, K]`` float32 (float64 for float64 logits).

    Raises:
        ValueError: a shape or ``score`` does not fit.  TypeError: a dtype is wrong.  RuntimeError: an id is out of
        range (checked on CPU; on CUDA such a pair is dropped).
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.

    Example:
        >>> chosen_weights(torch.zeros(1, 4), torch.tensor([[3, 1]])).tolist()
        [[0.5, 0.5]]
    """
    if not torch.compiler.is_compiling():
        op = "chosen_weights"
        _checks.check_tensor(op, "logits", logits, 2)
        _checks.check_float(op, "logits", logits)
        _checks.check_ids(op, "topk_ids", topk_ids)
        _checks.check_size(op, "topk_ids", topk_ids, 0, logits.shape[0], "one row per token")
        if score not in SCORES:
            raise ValueError(
                f"{op}: score must be one of {SCORES}, got {score!r}. Pick one of them."
            )
    return torch.ops.moeops.chosen_weights(
        logits, topk_ids.to(torch.int64), score=score, renormalize=renormalize, scale=scale
    )
