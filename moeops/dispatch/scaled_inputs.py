"""Weights on the experts' inputs, for those that know weights on outputs only. T tokens, K experts per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeops import _nests
from moeops.types import Routing, SlotRouting


def scale_inputs(routing: Routing | SlotRouting, inp: Any) -> tuple[Routing | SlotRouting, Any]:
    """Turn weights on the experts' inputs into tokens of their own, one per pair: ``T * K`` with one expert each.

    Dispatchers and experts then know outputs' weights only; those are 1. The first leaf is scaled, the one that the
    gate sees by default; all others are copied. Other routings pass through.
    """
    if not isinstance(routing, Routing) or not routing.scale_inputs:
        return routing, inp
    topk_ids, topk_weights, num_rows, _ = routing
    num_tokens, top_k = topk_ids.shape
    # Not read where the slot holds nothing: not even times the zero gradient of a dropped pair.
    factors = topk_weights.masked_fill(topk_ids < 0, 0).reshape(-1)  # [T * K]

    def copy(leaf: Tensor) -> Tensor:
        shape = leaf.shape[1:]
        copies = leaf.unsqueeze(1).expand(num_tokens, top_k, *shape)
        return copies.reshape(num_tokens * top_k, *shape)

    leaves, spec = _nests.flatten(inp)
    copies = [copy(leaf) for leaf in leaves]
    column = (-1, *(1,) * (copies[0].dim() - 1))
    copies[0] = (copies[0] * factors.reshape(column)).to(copies[0].dtype)
    ids = topk_ids.reshape(-1, 1)
    inp = _nests.unflatten(copies, spec)
    return Routing(ids, torch.ones_like(topk_weights).reshape(-1, 1), num_rows), inp


def sum_copies(routing: Routing | SlotRouting, out: Any) -> Any:
    """Sum what the copies made by ``scale_inputs`` got, token by token: ``[T * K, ...]`` to ``[T, ...]``."""
    if not isinstance(routing, Routing) or not routing.scale_inputs:
        return out
    num_tokens, top_k = routing.topk_ids.shape
    if top_k == 1:
        return out

    def fold(leaf: Tensor) -> Tensor:
        return leaf.reshape(num_tokens, top_k, *leaf.shape[1:]).sum(1)

    return _nests.map_leaves(fold, out)
