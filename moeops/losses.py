"""Auxiliary losses of routers, as functions. T tokens, E experts, K experts per token.

All are 0 for no tokens, and none copies to the host. ``moeops.auxiliary_loss`` collects the losses that gates set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.ops import _checks

# Makes 0 / 0 tokens 0 and changes no other quotient. A maximum would do the same in eager mode, but a compiler that
# takes a symbolic token count to be at least 2 simplifies it away, and then meets 0.
TINY = 1e-30


def balance_loss(router_probs: Tensor, topk_ids: Tensor) -> Tensor:
    """Compute the load-balancing loss of GShard and Switch: ``E * sum_e f_e * P_e``, 1 at perfect balance.

    ``f_e`` is the share of the ``T * K`` entries of ``topk_ids`` that name expert ``e`` (a constant for autograd),
    ``P_e`` the mean probability that the router gives to it. GShard counts first choices only: pass one column.

    Args:
        router_probs: ``[T, E]`` float, each row sums to 1.
        topk_ids: ``[T, K]`` integers, before any token is dropped.

    Returns:
        A scalar of the type of ``router_probs``; 0 for no tokens.

    Gradients: ``router_probs``.  Host sync: none.  Deterministic: yes.
    Source: GShard, arXiv:2006.16668, algorithm 1; Switch Transformer, arXiv:2101.03961, equation 4.

    Example:
        >>> balance_loss(torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    num_tokens, num_experts = router_probs.shape
    experts = torch.arange(num_experts, device=topk_ids.device)
    chosen = topk_ids[:, :, None] == experts  # [T, K, E]
    counts = chosen.to(router_probs.dtype).sum((0, 1))  # [E]
    pairs = num_tokens * topk_ids.shape[1]
    probs = router_probs.sum(0) / (num_tokens + TINY)  # [E]
    return num_experts * (counts / (pairs + TINY) * probs).sum()


def switch_loss(logits: Tensor, topk_ids: Tensor) -> Tensor:
    """Compute the Switch Transformer's loss from logits: ``balance_loss(softmax(logits), topk_ids)``.

    Every choice counts alike, so that it serves any ``K``; the loss that Mixtral and Qwen3 train with is ``K`` times
    this one.

    Args:
        logits: ``[T, E]``, any float type, computed in float32 (float64 for float64).
        topk_ids: ``[T, K]`` integers, before any token is dropped.

    Returns:
        A scalar, 1 at perfect balance.

    Raises:
        ValueError: a shape does not fit.  TypeError: a type does not fit.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.
    Source: Switch Transformer, arXiv:2101.03961, equation 4.

    Example:
        >>> float(switch_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]])))
        1.0
    """
    if not torch.compiler.is_compiling():
        _check_logits("switch_loss", logits)
        _check_ids("switch_loss", topk_ids, logits.shape[0])
    return balance_loss(_softmax(logits), topk_ids)


def gshard_loss(logits: Tensor, topk_ids: Tensor) -> Tensor:
    """Compute GShard's loss from logits: ``balance_loss`` of the first choices, column 0 of ``topk_ids``.

    Args:
        logits: ``[T, E]``, any float type, computed in float32 (float64 for float64).
        topk_ids: ``[T, K]`` integers, best first, before any token is dropped.

    Returns:
        A scalar, 1 at perfect balance.

    Raises:
        ValueError: a shape does not fit.  TypeError: a type does not fit.
    Gradients: ``logits``.  Host sync: none.  Deterministic: yes.
    Source: GShard, arXiv:2006.16668, algorithm 1.

    Example:
        >>> float(gshard_loss(torch.zeros(2, 2), torch.tensor([[0, 1], [1, 0]])))
        1.0
    """
    if not torch.compiler.is_compiling():
        _check_logits("gshard_loss", logits)
        _check_ids("gshard_loss", topk_ids, logits.shape[0])
    return balance_loss(_softmax(logits), topk_ids[:, :1])


def z_loss(logits: Tensor) -> Tensor:
    """Compute the router z-loss ``mean_t logsumexp(logits_t) ** 2``, which keeps logits small.

    Args:
        logits: ``[T, E]``, any float type, computed in float32 (float64 for float64).

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
        _check_logits("z_loss", logits)
    z = logits.to(_checks.accumulate_dtype(logits.dtype))
    # Not torch.logsumexp: it asks whether T * E is 0, which a compiler with an unbacked token count cannot answer.
    largest = z.detach().amax(-1, keepdim=True)  # [T, 1]
    logsumexp = (z - largest).exp().sum(-1).log() + largest[:, 0]  # [T]
    return logsumexp.square().sum() / (logits.shape[0] + TINY)


def router_entropy(logits: Tensor) -> Tensor:
    """Compute the mean entropy of ``softmax(logits)`` in nats: 0 for a certain router, ``log(E)`` for a uniform one.

    Add it to a loss for sharper choices, subtract it for softer ones, or log it.

    Args:
        logits: ``[T, E]``, any float type, finite, computed in float32 (float64 for float64).

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
        _check_logits("router_entropy", logits)
    log_probs = torch.log_softmax(logits.to(_checks.accumulate_dtype(logits.dtype)), dim=-1)
    return -(log_probs.exp() * log_probs).sum() / (logits.shape[0] + TINY)


def importance(topk_weights: Tensor, topk_ids: Tensor, num_experts: int) -> Tensor:
    """Sum the weights that each expert got.

    Args:
        topk_weights: ``[T, K]`` float.
        topk_ids: ``[T, K]`` integers in ``[-1, E)``; -1 counts for no expert.
        num_experts: ``E``.

    Returns:
        ``[E]`` of the type of ``topk_weights``; ``cv_squared`` of it is Shazeer's importance loss.

    Raises:
        ValueError: a shape does not fit.  TypeError: a type does not fit.
    Gradients: ``topk_weights``.  Host sync: none.  Deterministic: yes.
    Source: Shazeer et al. 2017, arXiv:1701.06538, equation 6.

    Example:
        >>> importance(torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]]), 3)
        tensor([0.2500, 0.0000, 0.7500])
    """
    if not torch.compiler.is_compiling():
        op = "importance"
        _checks.check_tensor(op, "topk_weights", topk_weights, 2)
        _checks.check_float(op, "topk_weights", topk_weights)
        _check_ids(op, topk_ids, topk_weights.shape[0])
        _checks.check_size(op, "topk_ids", topk_ids, 1, topk_weights.shape[1], "as topk_weights")
        _checks.check_int(op, "num_experts", num_experts, 1, "Pass the number of experts.")
    # A column of its own takes the dropped pairs.
    ids = torch.where(topk_ids < 0, num_experts, topk_ids).to(torch.int64)
    per_token = topk_weights.new_zeros(topk_weights.shape[0], num_experts + 1)
    return per_token.scatter(1, ids, topk_weights)[:, :num_experts].sum(0)


def cv_squared(values: Tensor) -> Tensor:
    """Compute the squared coefficient of variation ``var / mean ** 2``: 0 if all are equal, at most ``E - 1``.

    The variance is that of the whole population (divided by ``E``), as in the paper's own code; FastMoE divides by
    ``E - 1``.

    Args:
        values: ``[E]`` float, not negative.

    Returns:
        A scalar; 0 if all values are 0.

    Raises:
        ValueError: ``values`` is not ``[E]``.  TypeError: ``values`` is not float.
    Gradients: ``values``.  Host sync: none.  Deterministic: yes.
    Source: Shazeer et al. 2017, arXiv:1701.06538, equation 7.

    Example:
        >>> float(cv_squared(torch.tensor([2.0, 0.0])))
        1.0
    """
    if not torch.compiler.is_compiling():
        _checks.check_tensor("cv_squared", "values", values, 1)
        _checks.check_float("cv_squared", "values", values)
    mean = values.mean()
    return (values - mean).square().mean() / (mean.square() + TINY)


def _softmax(logits: Tensor) -> Tensor:
    """In the type that routers compute in."""
    return torch.softmax(logits.to(_checks.accumulate_dtype(logits.dtype)), dim=-1)


def _check_logits(op: str, logits: Tensor) -> None:
    _checks.check_tensor(op, "logits", logits, 2)
    _checks.check_float(op, "logits", logits)


def _check_ids(op: str, topk_ids: Tensor, num_tokens: int) -> None:
    _checks.check_ids(op, "topk_ids", topk_ids)
    _checks.check_size(op, "topk_ids", topk_ids, 0, num_tokens, "one row per token")
