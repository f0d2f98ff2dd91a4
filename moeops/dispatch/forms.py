"""In which rows the exact dispatcher sends tokens. T tokens, K experts each, R rows, W ranks, E_local experts on each.

``ByPair`` sends a row per token and expert, and ``ByRank`` a row per token and rank that has one of its experts, with
the ids and weights of its experts there, which the receiver sums. ``ByRank`` needs experts that take tokens with ids
and weights, as one call; rows of experts that take nothing but rows, and slots, travel by pair.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks, _nests
from moeops.dispatch.base import Block, Dispatcher, Experts, combine_leaf, permute_leaf
from moeops.dispatch.local import Chosen, LocalDispatcher, Record
from moeops.ops.sorting import count_tokens, sort_tokens
from moeops.types import Routing, SlotRouting


class Load(NamedTuple):
    """A part of the work before it is sent.

    Attributes:
        tokens: nest of ``[T, ...]``; of a gate that mixes tokens, the rows of all slots.
        record: what brings the answer back; its plan has a row for every pair, dropped ones too.
        counts: what is counted of what goes to each rank, ``[W, C]``.
        choices: what travels beside each token, ``[T, ...]``, if anything does.
    """

    tokens: Any
    record: Record
    counts: Tensor
    choices: Tensor | None = None


class Form:
    """What ``ByPair`` and ``ByRank`` have in common.

    Attributes:
        num_counts: ``C``, counts that travel from each rank to each.
    """

    num_counts: int

    def load(self, routing: Routing, tokens: Any) -> Load:
        """Sort a part of the tokens by where they go."""
        raise NotImplementedError(
            f"{type(self).__name__}: load must be written by the subclass, got none. Write it."
        )

    def rows_of(self, counts: Tensor) -> Tensor:
        """Rows that counts ``[..., C]`` stand for: ``[...]``."""
        raise NotImplementedError(
            f"{type(self).__name__}: rows_of must be written by the subclass, got none. Write it."
        )

    def sizes(self, received: Tensor) -> Tensor:
        """What the host must know of counts ``[W, C]`` that arrived, beside the rows."""
        raise NotImplementedError(
            f"{type(self).__name__}: sizes must be written by the subclass, got none. Write it."
        )

    def post(self, load: Load, num_rows: int) -> tuple[Any, Tensor | None, Record]:
        """Copy tokens into so many rows; return these, the rows beside them, and what brings their answers back."""
        record, choices = load.record, load.choices
        if not isinstance(record, Chosen):
            return load.tokens, choices, record
        # What has a place to go to comes first; what is dropped has no row from here on.
        torch._check(num_rows <= record.plan.row_to_pair.shape[0])
        kept = record.plan._replace(row_to_pair=record.plan.row_to_pair.narrow(0, 0, num_rows))
        rows = _nests.map_leaves(lambda leaf: permute_leaf(leaf, kept), load.tokens)
        choices = None if choices is None else permute_leaf(choices, kept)
        return rows, choices, record._replace(plan=kept)

    def run(
        self,
        rows: Any,
        received: Tensor,
        sizes: list[int],
        experts: Experts,
        block: Block | None,
    ) -> Any:
        """Run the experts on rows that arrived, with their counts: a nest of ``[R, ...]`` in the same order."""
        raise NotImplementedError(
            f"{type(self).__name__}: run must be written by the subclass, got none. Write it."
        )

    def combine(self, out: Any, record: Record) -> Any:
        """Sum the answers of each token."""
        raise NotImplementedError(
            f"{type(self).__name__}: combine must be written by the subclass, got none. Write it."
        )


class ByPair(Form):
    """A row per token and expert, in the order of experts. Ids stay with the sender: counts say as much.

    Args:
        num_expert: ``E_local``.
        num_ranks: ``W``.
    """

    def __init__(self, num_expert: int, num_ranks: int) -> None:
        self.num_expert = self.num_counts = num_expert
        self.num_ranks = num_ranks

    def load(self, routing: Routing, tokens: Any) -> Load:
        """Sort by expert, over all ranks."""
        plan = sort_tokens(routing.topk_ids, self.num_ranks * self.num_expert)
        return self._load(tokens, Chosen(plan, routing.topk_weights), plan.expert_offsets)

    def load_slots(self, routing: SlotRouting, tokens: Any) -> Load:
        """Mix tokens into the slots of all experts."""
        local = LocalDispatcher(self.num_ranks * self.num_expert)
        mixed, expert_offsets, record = local.dispatch(routing, tokens)
        return self._load(mixed, record, expert_offsets)

    def _load(self, tokens: Any, record: Record, expert_offsets: Tensor) -> Load:
        return Load(tokens, record, expert_offsets.diff().view(self.num_ranks, self.num_expert))

    def rows_of(self, counts: Tensor) -> Tensor:
        """Rows per expert, added up."""
        return counts.sum(-1)

    def sizes(self, received: Tensor) -> Tensor:
        """Rows of each expert."""
        return received.sum(0)

    def run(
        self,
        rows: Any,
        received: Tensor,
        sizes: list[int],
        experts: Experts,
        block: Block | None,
    ) -> Any:
        """Sort rows that are in the order of ranks, and of experts within a rank, by expert, and back."""
        num_rows = _nests.leaves(rows)[0].shape[0]
        ids = torch.arange(self.num_expert, dtype=torch.int32, device=received.device)
        ids = torch.repeat_interleave(
            ids.repeat(self.num_ranks), received.flatten(), output_size=num_rows
        )  # [R]
        plan = sort_tokens(ids.unsqueeze(1), self.num_expert)
        rows = _nests.map_leaves(lambda leaf: permute_leaf(leaf, plan), rows)
        out = experts(rows, plan.expert_offsets, sizes)
        return _nests.map_leaves(lambda leaf: combine_leaf(leaf, plan, None), out)

    def combine(self, out: Any, record: Record) -> Any:
        """Sum the experts' outputs of each token, weighted."""
        return LocalDispatcher(self.num_ranks * self.num_expert).combine(out, record)


class ByRank(Form):
    """A row per token and rank that has one of its experts; that rank sums the weighted outputs of its own.

    Counts are tokens and pairs. Of a token's experts all ids and weights travel to all its ranks.

    Args:
        num_expert: ``E_local``.
        num_ranks: ``W``.
        rank: this one.
        onward: the dispatcher that brings what arrived to the ``E_local`` experts.
    """

    num_counts = 2

    def __init__(self, num_expert: int, num_ranks: int, rank: int, onward: Dispatcher) -> None:
        self.num_expert = num_expert
        self.num_ranks = num_ranks
        self.rank = rank
        self.onward = onward

    def load(self, routing: Routing, tokens: Any) -> Load:
        """Sort by rank."""
        ids, weights = routing.topk_ids, routing.topk_weights
        owners, firsts = owners_of(ids, self.num_expert)
        num_pairs = count_tokens(owners, self.num_ranks)
        plan = sort_tokens(firsts, self.num_ranks)
        counts = torch.stack((plan.expert_offsets.diff(), num_pairs), 1)
        choices = pack_choices(ids, weights)  # [T, 2 K]
        return Load(tokens, Chosen(plan, weights), counts, choices)

    def rows_of(self, counts: Tensor) -> Tensor:
        """Tokens."""
        return counts[..., 0]

    def sizes(self, received: Tensor) -> Tensor:
        """Pairs of this rank."""
        return received[:, 1].sum(0, keepdim=True)

    def run(
        self,
        rows: Any,
        received: Tensor,
        sizes: list[int],
        experts: Experts,
        block: Block | None,
    ) -> Any:
        """Take each row for a token with its experts on this rank."""
        tokens, choices = rows
        ids, weights = unpack_choices(choices)
        ids = own_ids(ids, self.rank, self.num_expert)
        torch._check(sizes[0] <= ids.shape[0] * ids.shape[1])
        return self.onward.run(Routing(ids, weights, sizes[0]), tokens, experts, block)

    def combine(self, out: Any, record: Record) -> Any:
        """Add up what the ranks made of each token."""
        assert isinstance(record, Chosen)
        return _nests.map_leaves(lambda leaf: combine_leaf(leaf, record.plan, None), out)


def pack_choices(ids: Tensor, weights: Tensor) -> Tensor:
    """Ids and weights ``[T, K]`` as one tensor ``[T, 2 K]`` that autograd takes for weights: ids are bits in it."""
    dtype = _checks.accumulate_dtype(weights.dtype)
    bits = ids.to(_id_dtype(dtype)).view(dtype)
    return torch.cat((weights.to(dtype), bits), 1)


def unpack_choices(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Undo ``pack_choices``: ids, weights."""
    weights, bits = packed.chunk(2, 1)
    return bits.detach().view(_id_dtype(packed.dtype)), weights


def owners_of(ids: Tensor, num_expert: int) -> tuple[Tensor, Tensor]:
    """Who has a token's experts, ``num_expert`` each, ``[T, K]``, -1 for none; and the same with each owner once."""
    owners = torch.where(ids < 0, -1, ids // num_expert)  # [T, K]
    if owners.shape[1] == 1:
        return owners, owners
    # Each owner once: among the sorted ones, the first of those that are equal.
    ordered = owners.sort(1).values
    is_first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    return owners, torch.where(is_first, ordered, -1)


def own_ids(ids: Tensor, rank: int, num_expert: int) -> Tensor:
    """Ids counted from a rank's first expert, -1 for those of other ranks."""
    local = ids - rank * num_expert
    return torch.where((local >= 0) & (local < num_expert), local, -1)


def _id_dtype(dtype: torch.dtype) -> torch.dtype:
    """Integers with as many bits."""
    return torch.int64 if dtype == torch.float64 else torch.int32
