"""Losses of a router's logits, and the losses that gates know by name. T tokens, E experts, K per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import hide_masked, num_unmasked
from moeops.losses._common import TINY, check_logits
from moeops.losses.balance import gshard_loss, switch_loss


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the router z-loss ``mean_t logsumexp(logits_t) ** 2``, which keeps logits small.

    Args:
        logits: ``[T, E]``, any float type, computed in float32 (float64 for float64).
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar.

    Raises:
        ValueError: ``logits`` is not ``[T, E]``.  TypeError: ``logits`` is not float.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.
    Source: ST-MoE, arXiv:2202.08906, equation 5.

    Example:
        >>> float(z_loss(torch.zeros(3, 1)))
        0.0
    """
    if not torch.compiler.is_compiling():
        check_logits("z_loss", logits)
    z = logits.to(_checks.accumulate_dtype(logits.dtype))
    # Not torch.logsumexp: it asks whether T * E is 0, which a compiler with an unbacked token count cannot answer.
    largest = z.detach().amax(-1, keepdim=True)  # [T, 1]
    logsumexp = (z - largest).exp().sum(-1).log() + largest[:, 0]  # [T]
    return hide_masked(logsumexp.square(), mask).sum() / (num_unmasked(z, mask, z.dtype) + TINY)


def router_entropy(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the mean entropy of ``softmax(logits)`` in nats: 0 for a certain router, ``log(E)`` for a uniform one.

    Add it to a loss for sharper choices, subtract it for softer ones, or log it.

    Args:
        logits: ``[T, E]``, any float type, finite, computed in float32 (float64 for float64).
        mask: ``[T]``, tokens to leave out.

    Returns:
        A scalar.

    Raises:
        ValueError: ``logits`` is not ``[T, E]``.  TypeError: ``logits`` is not float.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.

    Example:
        >>> router_entropy(torch.zeros(3, 2))
        tensor(0.6931)
    """
    if not torch.compiler.is_compiling():
        check_logits("router_entropy", logits)
    log_probs = torch.log_softmax(logits.to(_checks.accumulate_dtype(logits.dtype)), dim=-1)
    terms = hide_masked(log_probs.exp() * log_probs, mask)  # [T, E]
    return -terms.sum() / (num_unmasked(logits, mask, log_probs.dtype) + TINY)


def _z(logits: Tensor, topk_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return z_loss(logits, mask=mask)


def _entropy(logits: Tensor, topk_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
    return router_entropy(logits, mask=mask)


# Losses that BaseGate.add_loss knows by name: functions of logits [T, E], topk_ids [T, K] and mask [T].
GATE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "z": _z,
    "entropy": _entropy,
    "switch": switch_loss,
    "gshard": gshard_loss,
}
