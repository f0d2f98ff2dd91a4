"""Jagged nested tensors as tokens: sequences of different lengths without padding. B sequences of T tokens together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def jagged_values(op: str, name: str, x: Any) -> Tensor:
    """The entries ``[T, ...]`` of a jagged ``[B, j, ...]``, sequence after sequence."""
    if x.layout != torch.jagged:
        raise NotImplementedError(
            f"{op}: {name} must have the layout torch.jagged if it is nested, got {x.layout}. "
            "Build it with torch.nested.nested_tensor(..., layout=torch.jagged), or pass its sequences joined."
        )
    if x._ragged_idx != 1:
        raise NotImplementedError(
            f"{op}: {name} must have its sequences in dimension 1 ([B, j, ...]) if it is nested, got the shape "
            f"{tuple(x.shape)}. Transpose it back."
        )
    if x.lengths() is not None:
        raise NotImplementedError(
            f"{op}: {name} must have no holes between its sequences if it is nested, got one with lengths (of "
            "torch.nested.narrow). Call .contiguous() on it."
        )
    return x.values()


def jagged_like(values: Tensor, x: Any) -> Tensor:
    """Entries ``[T, ...]`` as a nested tensor with the offsets of ``x``, so that both can be added."""
    return torch.nested.nested_tensor_from_jagged(values, offsets=x.offsets())
