"""Gate that balances ranks. T tokens, K experts per token, E experts, D model width, W ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked
from moeops.gates.functional import local_queues, router_logits
from moeops.gates.naive import NaiveGate
from moeops.ops.routing import topk_route


class SwipeGate(NaiveGate):
    """Give every rank the same number of pairs, by sending what a rank cannot take to ranks that have room.

    In training the choices of the plain top-k are gone through one by one, best choices first. A rank can take
    ``ceil(K * (tokens of all ranks) / W)`` pairs in all, from earlier ranks first, in token order. The pairs of a
    choice that do not fit are numbered in the same order and fill what is left of rank 0, rank 1 and so on; there
    they go to the rank's expert number ``k mod num_expert``, for choice ``k``. No pair is dropped. The weights are the
    softmax over the logits of the experts that a token got in the end. In evaluation, and with ``world_size=1``,
    this is ``NaiveGate``: balance over ranks has nothing to do there. There is no loss and no capacity.

    A redirected pair may meet an expert that the token has already; it then counts twice.

    Every training forward gathers ``K * W + 1`` counts over ``group``, on the device and without a host copy: all its
    ranks must call the gate.

    Departures from FastMoE's gate of the same name: it runs on the device, with one exchange for all choices, where
    FastMoE loops over tokens on the host and exchanges four times per choice; a rank's room is the mean over the
    ranks, where FastMoE gives each the number of its own pairs (the same for equal ``T``); the experts of a token that
    keeps its choice come best first; the router computes in float32.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ``W``, ranks that hold different experts.
        top_k: ``K``.
        gate_bias: give the router a bias.
        group: the ``W`` ranks that hold the experts, a process group; a layer may set it later.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.

    Raises:
        ValueError: a number does not fit, or ``group`` is missing in training with ``world_size > 1``.
        TypeError: a number is not an int.
    Source: BaGuaLu, PPoPP 2022, doi:10.1145/3503221.3508417; FastMoE, arXiv:2103.13262.

    Example:
        >>> topk_ids, topk_weights = SwipeGate(8, 4, 1, top_k=2)(torch.randn(5, 8))
        >>> topk_ids.shape, topk_weights.sum(-1).allclose(torch.ones(5))
        (torch.Size([5, 2]), True)
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
        *,
        group: Any = None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        self.group = group

    def forward(
        self, inp: Tensor, return_all_scores: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            inp: tokens, ``[T, D]``, any float type.
            return_all_scores: also return the router's logits.
            mask: ``[T]``, tokens that are not there; see ``BaseGate``.

        Returns:
            topk_ids ``[T, K]`` int64, topk_weights ``[T, K]`` float32 (float64 for float64), and on request the
            logits ``[T, E]``.
        """
        logits = router_logits(inp, self.gate)  # [T, E]
        topk_weights, topk_ids = topk_route(logits, self.top_k)
        every, topk_ids = topk_ids, drop_masked(topk_ids, mask)
        self.set_loss(None, logits, topk_ids, mask)
        if self.training and self.world_size > 1:
            topk_ids = self._balance_ranks(topk_ids, mask)
            chosen = topk_ids
            if mask is not None:
                chosen = torch.where((mask != 0)[:, None], every, topk_ids)
            topk_weights = torch.softmax(logits.gather(1, chosen), dim=-1)
        if return_all_scores:
            return topk_ids, topk_weights, logits
        return topk_ids, topk_weights

    def _balance_ranks(self, topk_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Redirect the pairs that their ranks cannot take."""
        group = self._moe_group("rank balancing")
        ranks = topk_ids // self.num_expert  # [T, K]
        # counts [W, K, W]: pairs of each choice from a rank to a rank.
        places, _, counts, tokens, me = local_queues(ranks, self.world_size, "choice", group, mask)
        pairs = tokens.sum() * self.top_k
        room = ((pairs + self.world_size - 1) // self.world_size).expand(self.world_size)  # [W]
        columns = []
        for k in range(self.top_k):
            column, room = self._redirect(
                topk_ids[:, k], places[:, k], counts[:, k], room, me, k, mask
            )
            columns.append(column)
        return torch.stack(columns, dim=1)

    def balance_choice(self, ids: Tensor, room: Tensor, k: int = 0) -> tuple[Tensor, Tensor]:
        """Redirect the pairs of one choice that their ranks cannot take: one step of what training does.

        All ranks of the group must call it; they exchange ``W + 1`` counts.

        Args:
            ids: one expert for each token, ``[T]``, int64 or int32.
            room: pairs that each rank can still take, ``[W]`` int64, the same on all ranks.
            k: number of the choice: redirected pairs go to expert ``k mod num_expert`` of a rank.

        Returns:
            The experts after that ``[T]``, dtype of ``ids``; the room that is left ``[W]``.

        Raises:
            ValueError: a shape does not fit, or there is no group of ``world_size`` ranks.  TypeError: ``ids`` is no
            integer tensor.
        Gradients: none.  Host sync: none.

        Example:
            >>> ids, room = SwipeGate(8, 4, 1).balance_choice(torch.tensor([3, 0, 2]), torch.tensor([4]))
            >>> ids.tolist(), room.tolist()
            ([3, 0, 2], [1])
        """
        op = f"{type(self).__name__}.balance_choice"
        if not torch.compiler.is_compiling():
            _checks.check_tensor(op, "ids", ids, 1)
            if ids.dtype not in _checks.ID_DTYPES:
                raise TypeError(
                    f"{op}: ids must be int32 or int64, got {_checks.describe(ids)}. Cast it."
                )
            _checks.check_tensor(op, "room", room, 1)
            _checks.check_size(op, "room", room, 0, self.world_size, "one for each rank")
            _checks.check_int(op, "k", k, 0, "Choices count from 0.")
        ranks = (ids // self.num_expert).unsqueeze(1)  # [T, 1]
        group = self._moe_group("rank balancing")
        places, _, counts, _, me = local_queues(ranks, self.world_size, "choice", group)
        return self._redirect(ids, places[:, 0], counts[:, 0], room, me, k, None)

    def _redirect(
        self,
        ids: Tensor,
        places: Tensor,
        wanted: Tensor,
        room: Tensor,
        me: int,
        k: int,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Move what does not fit of choice ``k``: ids and places ``[T]``, wanted ``[from, to]``, room ``[W]``."""
        ahead = wanted.cumsum(0) - wanted
        taken = torch.minimum(wanted, (room - ahead).clamp_min(0))
        room = room - taken.sum(0)
        over = (wanted - taken).sum(1)  # pairs of each rank that have to move
        until = room.cumsum(0)  # what ranks 0 to j can take
        moves = places >= taken[me][ids // self.num_expert]  # [T]
        if mask is not None:
            moves = moves & (mask == 0)
        number = over[:me].sum() + moves.to(torch.int64).cumsum(0) - 1
        target = torch.searchsorted(until, number, right=True).clamp(max=self.world_size - 1)
        there = target * self.num_expert + k % self.num_expert
        room = room - torch.minimum((over.sum() - (until - room)).clamp_min(0), room)
        return torch.where(moves, there, ids).to(ids.dtype), room
