"""Routing by noisy logits. T tokens, E experts, K experts per token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.ops._library import LIBRARY, refuse_second_gradient
from moeops.types import NoisyRoute


@torch.library.register_fake("moeops::noisy_topk_route")
def _noisy_topk_route_fake(clean, spread, noise, top_k, **_options):
    for name, value in (("spread", spread), ("noise", noise)):
        fake_check(
            value.shape[0] == clean.shape[0],
            f"noisy_topk_route: {name} must have one row per token, like clean. Check the routers.",
        )
    acc = _checks.accumulate_dtype(clean.dtype)
    num_tokens, num_experts = clean.shape
    return (
        clean.new_empty((num_tokens, top_k), dtype=acc),
        clean.new_empty((num_experts,), dtype=acc),
        clean.new_empty((num_experts,), dtype=acc),
        clean.new_empty((), dtype=acc),
        clean.new_empty((num_tokens, top_k), dtype=torch.int64),
        clean.new_empty((num_tokens,), dtype=torch.int64),
    )


@torch.library.register_fake("moeops::noisy_topk_route_backward")
def _noisy_topk_route_backward_fake(
    grad_weights, grad_importance, grad_load, grad_loss, clean, spread, *_rest, **_options
):
    return (
        torch.empty_like(clean, memory_format=torch.contiguous_format),
        torch.empty_like(clean, memory_format=torch.contiguous_format),
    )


def _noisy_topk_route_setup(ctx, inputs, keyword_only_inputs, output):
    clean, spread, noise, _ = inputs
    _, importance, load, _, topk_ids, runner_up = output
    ctx.mark_non_differentiable(topk_ids, runner_up)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(clean, spread, noise, topk_ids, runner_up, importance, load)
    ctx.options = keyword_only_inputs


def _noisy_topk_route_grad(
    ctx, grad_weights, grad_importance, grad_load, grad_loss, _grad_ids, _grad_runner_up
):
    grads = (grad_weights, grad_importance, grad_load, grad_loss)
    if all(grad is None for grad in grads):
        return (None,) * 4
    grad_clean, grad_spread = torch.ops.moeops.noisy_topk_route_backward(
        *grads, *ctx.saved_tensors, **ctx.options
    )
    return grad_clean, grad_spread, None, None


torch.library.register_autograd(
    "moeops::noisy_topk_route",
    _noisy_topk_route_grad,
    setup_context=_noisy_topk_route_setup,
    lib=LIBRARY,
)
refuse_second_gradient("noisy_topk_route_backward")


def noisy_topk_route(
    clean: Tensor, spread: Tensor, noise: Tensor, top_k: int, *, min_noise: float = 0.01
) -> NoisyRoute:
    """Choose experts by noisy logits, with the importance and load losses of Shazeer et al., in one pass.

    ``h = clean + noise * sigma`` with ``sigma = softplus(spread) + min_noise``; the ``top_k`` largest ``h`` are
    chosen, ties by lower id, and weighted by the softmax over them. ``importance_e`` is the sum of the weights that
    ``e`` got; ``load_e = sum_t Phi((clean_te - h'_te) / sigma_te)``, with ``h'`` the K-th largest of the other experts'
    ``h``: how many tokens ``e`` would get if its own noise were drawn again. With ``K = E`` it is the number of
    tokens, without a gradient. The loss is ``CV2(importance) + CV2(load)``, ``CV2 = var / mean ** 2`` over the experts.

    Args:
        clean: ``[T, E]``, any float type; computed in float32 (float64 for float64). On CUDA ``E`` is at most 2048.
        spread: ``[T, E]``, the same type.
        noise: ``[T, E]``, the same type, from ``N(0, 1)``; gets no gradient.
        top_k: ``K``.
        min_noise: the least ``sigma``, above 0.

    Returns:
        A NoisyRoute: topk_weights ``[T, K]``, importance ``[E]``, load ``[E]`` and loss ``[]``, all float32 (float64
        for float64), topk_ids ``[T, K]`` int64.

    Raises:
        ValueError: a shape or a number does not fit.  TypeError: a dtype is wrong.
        RuntimeError: a noisy logit is NaN or infinite (checked on CPU; on CUDA with ``MOEOPS_DEBUG_CHECKS=1``).
    Gradients: ``clean`` and ``spread`` through all but the ids.  Host sync: none.  Deterministic: yes.  Cost: reads
    each of the three once.
    Source: Shazeer et al. 2017, arXiv:1701.06538, sections 2.1 and 4, appendix A.

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> noisy_topk_route(zero, zero, zero, 1).load
        tensor([0.5000, 0.5000])
    """
    if not torch.compiler.is_compiling():
        op = "noisy_topk_route"
        for name, value in (("clean", clean), ("spread", spread), ("noise", noise)):
            _checks.check_tensor(op, name, value, 2)
            _checks.check_float(op, name, value)
            for dim in (0, 1):
                _checks.check_size(op, name, value, dim, clean.shape[dim], "as clean")
            _checks.check_device(op, name, value, "clean", clean)
            if value.dtype != clean.dtype:
                raise TypeError(
                    f"{op}: {name} must be {clean.dtype} like clean, got {_checks.describe(value)}. Cast one of them."
                )
        _checks.check_int(op, "top_k", top_k, 1, "Choose 1 <= top_k <= num_experts.")
        if top_k > clean.shape[1]:
            raise ValueError(
                f"{op}: top_k must be at most the {clean.shape[1]} experts, got {top_k}. Lower top_k."
            )
        if not 0 < min_noise < math.inf:
            raise ValueError(
                f"{op}: min_noise must be above 0 and finite, got {min_noise}. The load divides by the noise."
            )
    return NoisyRoute(
        *torch.ops.moeops.noisy_topk_route(clean, spread, noise, top_k, min_noise=min_noise)[:5]
    )
