"""Experts sharded by hidden unit: how tokens reach the shards, and what of an expert's tensors a shard holds.

An MLP with H hidden units is the sum of P MLPs with H / P of them each. So a token that goes to an expert goes to each
of its P shards with the same weight, and the weighted sum over the token's experts adds the shards up: to a dispatcher
a shard is one more expert, and nothing else has to travel.

T tokens, K experts per token, E experts in total, W ranks of which P hold shards of the same E_local experts, S slots
per expert. Rank ``w * P + p`` holds shard ``p`` of the experts ``w * E_local`` to ``(w + 1) * E_local``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops.dispatch.base import Beside, Block, Dispatcher, Experts, WrappingDispatcher
from moeops.types import Routing, SlotRouting

__all__ = ["ShardSpan", "ShardedDispatcher", "route_to_shards", "take_shard"]


def route_to_shards(
    routing: Routing | SlotRouting, num_expert: int, expert_ranks: int, num_shards: int
) -> Routing | SlotRouting:
    """Choose all shards of the experts that a gate chose; weights are repeated, and their gradients summed.

    Shard ``p`` of expert ``w * E_local + j`` is number ``(w * P + p) * E_local + j``: ranks hold them in order.

    Args:
        routing: a ``Routing`` or a ``SlotRouting``.
        num_expert: ``E_local``.
        expert_ranks: ``W / P``, ranks that hold different experts.
        num_shards: ``P``.

    Returns:
        The same for ``E * P`` shards: ids ``[T, K * P]``, or weights ``[T, E * P * S]``.

    Example:
        >>> routing = Routing(torch.tensor([[0, 3], [-1, 2]]), torch.tensor([[0.5, 2.0], [0.0, 1.0]]))
        >>> ids, weights, _, _ = route_to_shards(routing, num_expert=2, expert_ranks=2, num_shards=2)
        >>> ids.tolist()
        [[0, 2, 5, 7], [-1, -1, 4, 6]]
        >>> weights[0].tolist()
        [0.5, 0.5, 2.0, 2.0]
    """
    if isinstance(routing, SlotRouting):
        dispatch, combine, tokens_per_group = routing

        def repeat(weights: Tensor) -> Tensor:
            num_tokens, num_slots = weights.shape
            by_rank = weights.reshape(num_tokens, expert_ranks, 1, num_slots // expert_ranks)
            shards = by_rank.expand(-1, -1, num_shards, -1)
            return shards.reshape(num_tokens, num_slots * num_shards)

        return SlotRouting(repeat(dispatch), repeat(combine), tokens_per_group)
    ids, weights, num_rows, scales = routing
    num_tokens, top_k = ids.shape
    first = ids + (num_shards - 1) * (ids - ids % num_expert)  # [T, K], number of shard 0
    step = num_expert * torch.arange(num_shards, dtype=ids.dtype, device=ids.device)
    shard_ids = torch.where((ids < 0).unsqueeze(2), -1, first.unsqueeze(2) + step)  # [T, K, P]
    return Routing(
        shard_ids.reshape(num_tokens, top_k * num_shards),
        weights.unsqueeze(2).expand(-1, -1, num_shards).reshape(num_tokens, top_k * num_shards),
        None if num_rows is None else num_rows * num_shards,
        scales,
    )


class ShardedDispatcher(WrappingDispatcher):
    """Bring tokens to all shards of their experts, and the sum of the shards' outputs back, by another dispatcher.

    Args:
        inner: the dispatcher of the ``W`` ranks, for ``E_local`` shards on each.
        num_expert: ``E_local``.
        expert_ranks: ``W / P``.
        num_shards: ``P``.

    Host sync: that of ``inner``.
    """

    def __init__(
        self, inner: Dispatcher, num_expert: int, expert_ranks: int, num_shards: int
    ) -> None:
        super().__init__(inner)
        self.num_expert = num_expert
        self.expert_ranks = expert_ranks
        self.num_shards = num_shards

    def start(self, inp: Any, weights: Callable[[], Any], table: Tensor | None) -> dict[str, Any]:
        """Begin what ``inner`` begins."""
        return self.inner.start(inp, weights, table)

    def _route(self, routing: Routing | SlotRouting) -> Routing | SlotRouting:
        return route_to_shards(routing, self.num_expert, self.expert_ranks, self.num_shards)

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        *,
        beside: Beside | None = None,
        **early: Any,
    ) -> Any:
        """Dispatch, run the shards, combine; ``early`` is what ``start`` returned."""
        return self.inner.run(self._route(routing), inp, experts, block, beside=beside, **early)


class ShardSpan(NamedTuple):
    """What of a whole tensor a shard holds: some ranges of one dimension, one behind the other.

    Attributes:
        dim: the dimension that is divided.
        size: of the whole, along ``dim``.
        ranges: start and length of each.
    """

    dim: int
    size: int
    ranges: tuple[tuple[int, int], ...]


def take_shard(whole: Tensor, span: ShardSpan) -> Tensor:
    """Copy a shard out of the whole.

    Example:
        >>> take_shard(torch.arange(8), ShardSpan(0, 8, ((2, 2), (6, 2)))).tolist()
        [2, 3, 6, 7]
    """
    return torch.cat([whole.narrow(span.dim, start, n) for start, n in span.ranges], span.dim)
