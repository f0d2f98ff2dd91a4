"""Dispatch on one rank. T tokens, K experts per token, R rows, E experts, S slots, G groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks, _nests
from moeops._token_groups import join_token_groups, split_token_groups
from moeops.dispatch.base import (
    Beside,
    Block,
    Dispatcher,
    Experts,
    as_rows,
    combine_leaf,
    permute_leaf,
)
from moeops.ops.sorting import sort_tokens
from moeops.types import Routing, SlotRouting, TokenPlan


class Chosen(NamedTuple):
    """What brings the rows of chosen experts back to their tokens.

    Attributes:
        plan: which row is of which token.
        topk_weights: ``[T, K]``.
    """

    plan: TokenPlan
    topk_weights: Tensor


class Mixed(NamedTuple):
    """What brings slots back to the tokens that they are a mixture of, see ``SlotRouting``.

    Attributes:
        combine_weights: ``[T, E * S]``.
        tokens_per_group: tokens that are mixed with each other; ``None`` for all.
    """

    combine_weights: Tensor
    tokens_per_group: int | None


Record = Chosen | Mixed


class LocalDispatcher(Dispatcher):
    """Every expert is on this rank: rows are sorted by expert, slots are weighted sums of tokens.

    With hooks on rows, rows are made for them, in expert order, also where experts are one call that needs none.

    Args:
        num_experts: ``E``.

    Host sync: none.

    Example:
        >>> routing = Routing(torch.tensor([[1], [0]]), torch.tensor([[0.5], [2.0]]))
        >>> rows, offsets, record = LocalDispatcher(2).dispatch(routing, torch.tensor([[1.0], [3.0]]))
        >>> rows.tolist(), offsets.tolist(), LocalDispatcher(2).combine(rows, record).tolist()
        ([[3.0], [1.0]], [0, 1, 2], [[0.5], [6.0]])
    """

    takes_stage_hooks = True

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        *,
        beside: Beside | None = None,
    ) -> Any:
        """Dispatch, run the experts, combine: in one call where there is one for chosen experts."""
        if beside is not None:
            beside()
        hooks = self.stage_hooks
        if block is not None and isinstance(routing, Routing) and not hooks.on_rows:
            return block(inp, routing.topk_weights, self._plan(routing))
        rows, expert_offsets, record = self.dispatch(routing, inp)
        rows = hooks.call("after_dispatch", hooks.call("before_dispatch", rows))
        out = experts(rows, expert_offsets, None)
        out = hooks.call("after_combine", hooks.call("before_combine", out))
        return self.combine(out, record)

    def _plan(self, routing: Routing) -> TokenPlan:
        return sort_tokens(routing.topk_ids, self.num_experts, routing.num_rows)

    def dispatch(self, routing: Routing | SlotRouting, inp: Any) -> tuple[Any, Tensor, Record]:
        """Sort a copy of each token's leaves by expert, or mix the tokens of each slot."""
        if isinstance(routing, Routing):
            plan = self._plan(routing)
            rows = _nests.map_leaves(lambda leaf: permute_leaf(leaf, plan), inp)
            return rows, plan.expert_offsets, Chosen(plan, routing.topk_weights)
        weights = split_token_groups(
            routing.dispatch_weights, routing.tokens_per_group
        )  # [G, L, E * S]
        rows = _nests.map_leaves(
            lambda leaf: self._mix_leaf(leaf, weights, routing.tokens_per_group), inp
        )
        rows_per_expert = weights.shape[0] * (weights.shape[2] // self.num_experts)  # G * S
        ends = torch.arange(self.num_experts + 1, dtype=torch.int32, device=weights.device)
        record = Mixed(routing.combine_weights, routing.tokens_per_group)
        return rows, ends * rows_per_expert, record

    def combine(self, out: Any, record: Record) -> Any:
        """Sum the outputs of each token's experts, or of all slots of its group, weighted."""
        if isinstance(record, Mixed):
            return _nests.map_leaves(lambda leaf: self._unmix_leaf(leaf, record), out)
        plan, topk_weights = record
        return _nests.map_leaves(lambda leaf: combine_leaf(leaf, plan, topk_weights), out)

    def _mix_leaf(self, leaf: Tensor, weights: Tensor, tokens_per_group: int | None) -> Tensor:
        """Mix ``[T, ...]`` by weights ``[G, L, E * S]`` into rows ``[E * G * S, ...]``."""
        if leaf.dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(
                f"LocalDispatcher: moe_inp must hold float tensors where a gate mixes tokens, got "
                f"{_checks.describe(leaf)}. Pass such values to a gate that chooses experts."
            )
        tokens = split_token_groups(as_rows(leaf), tokens_per_group)  # [G, L, row]
        slots = torch.bmm(weights.transpose(1, 2).to(leaf.dtype), tokens)  # [G, E * S, row]
        num_groups, num_slots, row = slots.shape
        by_expert = slots.unflatten(1, (self.num_experts, num_slots // self.num_experts))
        rows = by_expert.transpose(0, 1).reshape(num_groups * num_slots, row)
        return rows.reshape(num_groups * num_slots, *leaf.shape[1:])

    def _unmix_leaf(self, leaf: Tensor, record: Mixed) -> Tensor:
        """Mix rows ``[E * G * S, ...]`` back into ``[T, ...]``."""
        num_tokens, num_slots = record.combine_weights.shape
        weights = split_token_groups(
            record.combine_weights, record.tokens_per_group
        )  # [G, L, E * S]
        num_groups, per_expert = weights.shape[0], num_slots // self.num_experts
        flat = as_rows(leaf)
        row = flat.shape[1]
        slots = flat.reshape(self.num_experts, num_groups, per_expert, row).transpose(0, 1)
        slots = slots.reshape(num_groups, num_slots, row)
        y = torch.bmm(weights.to(leaf.dtype), slots)  # [G, L, row]
        y = join_token_groups(y, record.tokens_per_group, num_tokens)
        return y.reshape(num_tokens, *leaf.shape[1:])
