"""The maths that gates share. T tokens, E experts, K experts per token, D model width, C capacity in rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops.ops import _checks

_MILLION = 1_000_000


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


def expert_loads(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Count the pairs of each expert.

    Args:
        topk_ids: ``[T, K]`` integers in ``[-1, E)``; -1 counts for no expert.
        num_experts: ``E``.

    Returns:
        ``[E]`` int64.

    Raises:
        ValueError: ``topk_ids`` is not ``[T, K]``.  TypeError: it does not hold integers.
    Host sync: none.  Deterministic: yes.

    Example:
        >>> expert_loads(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
        [1, 0, 2]
    """
    if not torch.compiler.is_compiling():
        _checks.check_ids("expert_loads", "topk_ids", topk_ids)
        _checks.check_int(
            "expert_loads", "num_experts", num_experts, 1, "Pass the number of experts."
        )
    ids = topk_ids.reshape(-1).to(torch.int64)
    ids = torch.where(ids < 0, num_experts, ids)  # a bin of their own
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(0, ids, torch.ones_like(ids))[:num_experts]


def check_scale(gate: str, scale: object) -> None:
    """``scale`` is a finite number above 0."""
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(
            f"{gate}: scale must be above 0 and finite, got {scale!r}. Use 1.0 for none."
        )


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
