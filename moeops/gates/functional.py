"""The maths that gates share. T tokens, E experts, K experts per token, D model width, C capacity in rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops.ops import _checks

_MILLION = 1_000_000

# Makes 0 / 0 tokens 0 and changes no other quotient. A maximum would do the same in eager mode, but a compiler that
# takes a symbolic token count to be at least 2 simplifies it away, and then meets 0.
_TINY = 1e-30


def router_logits(x: Tensor, router: nn.Linear) -> Tensor:
    """Apply a linear router in float32, whatever the types of the model and of autocast.

    Args:
        x: tokens, ``[T, D]``, any float type.
        router: the linear layer ``D -> E``, any float type.

    Returns:
        Logits ``[T, E]``, float32 (float64 for float64 ``x``).

    Raises:
        ValueError: ``x`` is not ``[T, D]``.  TypeError: ``x`` is not float.
    Gradients: ``x`` and the router's parameters.  Host sync: none.

    Example:
        >>> router_logits(torch.ones(3, 4, dtype=torch.bfloat16), nn.Linear(4, 2)).dtype
        torch.float32
    """
    if not torch.compiler.is_compiling():
        op = "router_logits"
        _checks.check_tensor(op, "x", x, 2)
        _checks.check_float(op, "x", x)
        _checks.check_size(op, "x", x, 1, router.in_features, "the router's inputs")
    dtype = _checks.accumulate_dtype(x.dtype)
    weight = router.weight.to(dtype)
    bias = None if router.bias is None else router.bias.to(dtype)
    device = x.device.type
    # Entered only where it changes something: an autocast region is one more thing for an exported graph to carry.
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(x.to(dtype), weight, bias)
    return F.linear(x.to(dtype), weight, bias)


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
    probs = router_probs.sum(0) / (num_tokens + _TINY)  # [E]
    return num_experts * (counts / (pairs + _TINY) * probs).sum()


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """Compute the capacity in rows per expert: ``ceil(capacity_factor * T * K / E)``.

    In integers, on the factor rounded to millionths: it traces with a symbolic token count, and 1.2 means 6 / 5.

    Args:
        capacity_factor: 1.0 leaves room for exactly the average load.
        num_tokens: ``T``, may be symbolic.
        top_k: ``K``.
        num_experts: ``E``.

    Returns:
        ``C``, an int or a symbolic int.

    Example:
        >>> expert_capacity(1.25, 10, 2, 8)
        4
    """
    divisor = _MILLION * num_experts
    rows = num_tokens * (round(capacity_factor * _MILLION) * top_k)
    return (rows + divisor - 1) // divisor


def check_capacity(gate: str, capacity: object) -> tuple[float, float] | None:
    """Read a capacity argument: ``None``, one factor, or (training, evaluation)."""
    if capacity is None:
        return None
    pair = capacity if isinstance(capacity, (tuple, list)) else (capacity, capacity)
    if len(pair) != 2 or not all(isinstance(c, (int, float)) and 0 < c < 1e6 for c in pair):
        raise ValueError(
            f"{gate}: capacity must be None, a factor, or a pair (training, evaluation) of factors above 0, "
            f"got {capacity!r}. 1.0 leaves room for exactly the average load."
        )
    return float(pair[0]), float(pair[1])
