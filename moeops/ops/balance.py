"""Routing together with what balance losses read of it. T tokens, E experts, K experts per token."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.ops._library import LIBRARY, refuse_second_gradient
from moeops.ops.routing import check_route, weight_options
from moeops.types import BalancedRoute

GROUP_SCORES = ("top2", "sum")


@torch.library.register_fake("moeops::topk_route_balance")
def _topk_route_balance_fake(logits, top_k, bias=None, uniform=None, temperature=None, **_options):
    if uniform is not None:
        fake_check(
            uniform.shape[0] == logits.shape[0],
            "topk_route_balance: uniform must have one number per token. Draw torch.rand(T).",
        )
    return _route_fake("topk_route_balance", logits, top_k)


def _route_fake(op, logits, top_k):
    fake_check(logits.dim() == 2, f"{op}: logits must have 2 dimensions. Reshape them first.")
    num_tokens, num_experts = logits.shape
    acc = _checks.accumulate_dtype(logits.dtype)
    return (
        logits.new_empty((num_tokens, top_k), dtype=acc),
        logits.new_empty((num_experts,), dtype=acc),
        logits.new_empty((), dtype=acc),
        logits.new_empty((num_tokens, top_k), dtype=torch.int64),
        logits.new_empty((num_experts,), dtype=torch.int32),
    )


@torch.library.register_fake("moeops::topk_route_balance_backward")
def _topk_route_balance_backward_fake(
    grad_weights, grad_sums, grad_loss, logits, temperature, ids, counts, **_options
):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _topk_route_balance_setup(ctx, inputs, keyword_only_inputs, output):
    logits, _, _, _, temperature = inputs
    _, _, _, topk_ids, counts = output
    ctx.mark_non_differentiable(topk_ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, temperature, topk_ids, counts)
    ctx.options = weight_options(keyword_only_inputs)


def _topk_route_balance_grad(ctx, grad_weights, grad_sums, grad_loss, _grad_ids, _grad_counts):
    if grad_weights is None and grad_sums is None and grad_loss is None:
        return (None,) * 5
    grad_logits = torch.ops.moeops.topk_route_balance_backward(
        grad_weights, grad_sums, grad_loss, *ctx.saved_tensors, **ctx.options
    )
    return grad_logits, None, None, None, None


torch.library.register_autograd(
    "moeops::topk_route_balance",
    _topk_route_balance_grad,
    setup_context=_topk_route_balance_setup,
    lib=LIBRARY,
)
refuse_second_gradient("topk_route_balance_backward")


def topk_route_balance(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
    top_p: float = 1.0,
    min_score: float = 0.0,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    num_counted: int | None = None,
) -> BalancedRoute:
    """``topk_route``, ``score_sums`` and ``count_tokens`` in one pass over the logits, with the balance loss of them.

    The loss is ``E * sum_e f_e * P_e``: ``f_e`` the share of the counted pairs that name expert ``e`` (a constant for
    autograd), ``P_e`` the mean over the tokens of the expert's share of the scores; 1 at perfect balance. The
    backward is one pass as well.

    Beyond the options of ``topk_route``:

    - **Fewer than K experts.** A token's choices end where the better ones have reached the mass ``top_p`` of the
      scores, and where a score is below ``min_score``; the first one stays. The others get id -1 and weight 0,
      count for nothing, and ``renormalize`` divides by the sum of those that are left.
    - **A sampled expert.** With ``uniform`` the last choice is a sample of the softmax over the experts that the
      choices before it leave.
    - **Groups** by the sum of all their scores.

    Args:
        logits: router logits, ``[T, E]``, any float type, finite. On CUDA ``E`` is at most 2048.
        top_k: ``K``.
        score: ``"softmax"`` or ``"sigmoid"``.
        renormalize: divide the chosen scores by their sum.
        scale: factor on the weights.
        bias: ``[E]`` float, added to the scores for the choice only; gets no gradient.
        num_groups: number of equal expert groups, a divisor of ``E``.
        top_groups: groups a token may use.
        group_score: what a group is worth: ``"top2"``, its two best biased scores, or ``"sum"``, all of them.
        top_p: above 0; 1 for no limit.
        min_score: at least 0.
        uniform: ``[T]`` float in ``[0, 1)``, with softmax scores only and without bias and groups.
        temperature: a scalar tensor above 0 (checked on CPU), which divides the logits; gets no gradient.
        num_counted: choices of a token that are counted, from the first one on; ``None`` for all.

    Returns:
        A BalancedRoute: topk_weights ``[T, K]``, score_sums ``[E]`` and balance_loss ``[]``, all float32 (float64 for
        float64 logits), topk_ids ``[T, K]`` int64 and tokens_per_expert ``[E]`` int32. All sums are 0 for no tokens.

    Raises:
        ValueError: a shape, a number or a name does not fit.  TypeError: ``logits`` is not float.
        RuntimeError: a logit is NaN or infinite (checked on CPU; on CUDA with ``MOEOPS_DEBUG_CHECKS=1``).
    Gradients: ``logits`` through weights, sums and loss.  Host sync: none.  Deterministic: yes.  Cost: reads the
    logits once.
    Source: as ``topk_route``; the loss: Switch Transformer, arXiv:2101.03961, equation 4; top-p: arXiv:2403.07652;
    groups by sum: arXiv:2110.07431.

    Example:
        >>> route = topk_route_balance(torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]]), 2)
        >>> route.topk_ids.tolist(), route.tokens_per_expert.tolist()
        ([[1, 2], [2, 1]], [0, 2, 2])
    """
    if not torch.compiler.is_compiling():
        _check_topk_route_balance(
            logits,
            top_k,
            score,
            bias,
            num_groups,
            top_groups,
            group_score,
            top_p,
            min_score,
            uniform,
            temperature,
            num_counted,
        )
    return BalancedRoute(
        *torch.ops.moeops.topk_route_balance(
            logits,
            top_k,
            bias,
            uniform,
            temperature,
            score=score,
            renormalize=renormalize,
            scale=scale,
            num_groups=num_groups,
            top_groups=top_groups,
            group_score=group_score,
            top_p=top_p,
            min_score=min_score,
            num_counted=num_counted,
        )
    )


def _check_topk_route_balance(
    logits,
    top_k,
    score,
    bias,
    num_groups,
    top_groups,
    group_score,
    top_p,
    min_score,
    uniform,
    temperature,
    num_counted,
):
    op = "topk_route_balance"
    check_route(op, logits, top_k, score, bias, num_groups, top_groups)
    if group_score not in GROUP_SCORES:
        raise ValueError(
            f"{op}: group_score must be one of {GROUP_SCORES}, got {group_score!r}. Pick one of them."
        )
    if not top_p > 0:
        raise ValueError(f"{op}: top_p must be above 0, got {top_p}. Use 1 for no limit.")
    if not min_score >= 0:
        raise ValueError(f"{op}: min_score must be at least 0, got {min_score}. Use 0 for none.")
    if uniform is not None:
        _checks.check_tensor(op, "uniform", uniform, 1)
        _checks.check_float(op, "uniform", uniform)
        _checks.check_size(op, "uniform", uniform, 0, logits.shape[0], "one number per token")
        _checks.check_device(op, "uniform", uniform, "logits", logits)
        if score != "softmax" or bias is not None or num_groups > 1:
            raise ValueError(
                f"{op}: uniform must be None unless the score is a softmax without bias and groups, got "
                f"{_checks.describe(uniform)}. Drop one of them."
            )
    if temperature is not None:
        _checks.check_tensor(op, "temperature", temperature, 0)
        _checks.check_float(op, "temperature", temperature)
        _checks.check_device(op, "temperature", temperature, "logits", logits)
    if num_counted is not None:
        _checks.check_int(op, "num_counted", num_counted, 0, "Use None for all choices.")
        if num_counted > top_k:
            raise ValueError(
                f"{op}: num_counted must be at most top_k = {top_k}, got {num_counted}. Use None for all choices."
            )


@torch.library.register_fake("moeops::prototype_route")
def _prototype_route_fake(logits, num_prototypes):
    return _route_fake("prototype_route", logits, num_prototypes)


@torch.library.register_fake("moeops::prototype_route_backward")
def _prototype_route_backward_fake(grad_weights, grad_sums, grad_loss, logits, ids, counts):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _prototype_route_setup(ctx, inputs, output):
    _, _, _, topk_ids, counts = output
    ctx.mark_non_differentiable(topk_ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], topk_ids, counts)


def _prototype_route_grad(ctx, grad_weights, grad_sums, grad_loss, _grad_ids, _grad_counts):
    if grad_weights is None and grad_sums is None and grad_loss is None:
        return None, None
    grad_logits = torch.ops.moeops.prototype_route_backward(
        grad_weights, grad_sums, grad_loss, *ctx.saved_tensors
    )
    return grad_logits, None


torch.library.register_autograd(
    "moeops::prototype_route",
    _prototype_route_grad,
    setup_context=_prototype_route_setup,
    lib=LIBRARY,
)
refuse_second_gradient("prototype_route_backward")


def prototype_route(logits: Tensor, num_prototypes: int) -> BalancedRoute:
    """Choose one expert in each of ``K`` equal groups, weighted by the softmax over its group.

    Group ``k`` holds experts ``k * E / K`` to ``(k + 1) * E / K``; column ``k`` of ids and weights belongs to it. Sums
    and loss are those of ``topk_route_balance`` with the softmaxes of the groups as scores: ``score_sums`` adds up to
    ``K * T``, and the loss is ``K`` at perfect balance.

    Args:
        logits: router logits, ``[T, E]``, any float type, finite. On CUDA ``E`` is at most 2048.
        num_prototypes: ``K``, a divisor of ``E``.

    Returns:
        A BalancedRoute, see ``topk_route_balance``.

    Raises:
        ValueError: a shape or ``num_prototypes`` does not fit.  TypeError: ``logits`` is not float.
        RuntimeError: a logit is NaN or infinite (checked on CPU; on CUDA with ``MOEOPS_DEBUG_CHECKS=1``).
    Gradients: ``logits`` through weights, sums and loss.  Host sync: none.  Deterministic: yes.  Cost: reads the
    logits once.
    Source: M6-T, arXiv:2105.15082, section 3.3.

    Example:
        >>> prototype_route(torch.tensor([[0.0, 2.0, 5.0, 1.0]]), 2).topk_ids.tolist()
        [[1, 2]]
    """
    if not torch.compiler.is_compiling():
        op = "prototype_route"
        _checks.check_tensor(op, "logits", logits, 2)
        _checks.check_float(op, "logits", logits)
        _checks.check_int(op, "num_prototypes", num_prototypes, 1, "Use 1 for no groups.")
        num_experts = logits.shape[1]
        if num_experts == 0 or num_experts % num_prototypes != 0:
            raise ValueError(
                f"{op}: num_prototypes must divide the {num_experts} experts, got {num_prototypes}. Choose a divisor."
            )
    return BalancedRoute(*torch.ops.moeops.prototype_route(logits, num_prototypes))


@torch.library.register_fake("moeops::relu_route")
def _relu_route_fake(logits):
    return _route_fake("relu_route", logits, logits.shape[1])


@torch.library.register_fake("moeops::relu_route_backward")
def _relu_route_backward_fake(grad_weights, grad_sums, grad_loss, logits, counts):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _relu_route_setup(ctx, inputs, output):
    _, _, _, topk_ids, counts = output
    ctx.mark_non_differentiable(topk_ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], counts)


def _relu_route_grad(ctx, grad_weights, grad_sums, grad_loss, _grad_ids, _grad_counts):
    if grad_weights is None and grad_sums is None and grad_loss is None:
        return None
    return torch.ops.moeops.relu_route_backward(
        grad_weights, grad_sums, grad_loss, *ctx.saved_tensors
    )


torch.library.register_autograd(
    "moeops::relu_route", _relu_route_grad, setup_context=_relu_route_setup, lib=LIBRARY
)
refuse_second_gradient("relu_route_backward")


def relu_route(logits: Tensor) -> BalancedRoute:
    """Choose every expert with a positive logit, weighted by it: ``K = E`` slots, slot ``e`` for expert ``e``.

    Sums and loss are those of ``topk_route_balance`` with ``relu(logits)`` as scores that are not divided by their
    sum: ``score_sums = sum_t relu(logits_t)``, and ``balance_loss = E / T * sum_e f_e * score_sums_e``.

    Args:
        logits: router logits, ``[T, E]``, any float type, finite. On CUDA ``E`` is at most 2048.

    Returns:
        A BalancedRoute, see ``topk_route_balance``; slots without an expert hold id -1 and weight 0.

    Raises:
        ValueError: ``logits`` is not ``[T, E]``.  TypeError: ``logits`` is not float.
        RuntimeError: a logit is NaN or infinite (checked on CPU; on CUDA with ``MOEOPS_DEBUG_CHECKS=1``).
    Gradients: ``logits`` through weights, sums and loss.  Host sync: none.  Deterministic: yes.  Cost: reads the
    logits once.
    Source: ReMoE, arXiv:2412.14711.

    Example:
        >>> route = relu_route(torch.tensor([[0.5, -1.0, 2.0]]))
        >>> route.topk_ids.tolist(), route.tokens_per_expert.tolist()
        ([[0, -1, 2]], [1, 0, 1])
    """
    if not torch.compiler.is_compiling():
        _checks.check_tensor("relu_route", "logits", logits, 2)
        _checks.check_float("relu_route", "logits", logits)
    return BalancedRoute(*torch.ops.moeops.relu_route(logits))
