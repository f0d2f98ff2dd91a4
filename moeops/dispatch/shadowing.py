"""Hot experts whose weights travel instead of their tokens. T tokens, K experts each, E experts, E_local on a rank.

FasterMoE's expert shadowing: He et al. 2022, "FasterMoE: modeling and optimizing training of large-scale dynamic
pre-trained models", PPoPP 2022, doi:10.1145/3503221.3508418.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeops import _checks, _nests
from moeops.comm.collectives import all_gather_counts
from moeops.dispatch.base import Beside, Block, Experts, combine_leaf, permute_leaf
from moeops.dispatch.exact import ExactDispatcher
from moeops.dispatch.weights import Broadcast, ExpertWeights, SharingDispatcher
from moeops.ops.sorting import count_tokens, sort_tokens
from moeops.types import Routing, SlotRouting

if TYPE_CHECKING:
    from moeops.cost.model import CostModel


@dataclass(frozen=True)
class ShadowPolicy:
    """When to send an expert's weights to all ranks instead of its tokens to the expert: costs in seconds.

    Attributes:
        row_seconds: one row through one expert.
        exchange_seconds: one row to another rank and its output back.
        fetch_seconds: one expert's weights to all ranks.
        max_shadows: experts that may travel in a forward, at least 1: their weights are kept until the backward.

    With gradients, all three are of the forward and the backward together.

    Raises:
        ValueError: a cost is negative or not finite, or ``max_shadows`` is below 1.

    Example:
        >>> policy = ShadowPolicy(row_seconds=1.0, exchange_seconds=1.0, fetch_seconds=2.0)
        >>> counts = torch.tensor([[4, 1], [4, 1]])  # rank 0 owns expert 0, to which rank 1 sends 4 tokens
        >>> choose_shadows(counts, 1, policy).tolist()
        [True, False]
    """

    row_seconds: float
    exchange_seconds: float
    fetch_seconds: float
    max_shadows: int = 4

    @classmethod
    def from_cost_model(
        cls,
        model: CostModel,
        d_model: int,
        d_hidden: int,
        *,
        world_size: int,
        num_projections: int = 2,
        dtype: torch.dtype = torch.float32,
        node_size: int | None = None,
        backward: bool = True,
        max_shadows: int = 4,
    ) -> ShadowPolicy:
        """Take the costs of MLP experts from what was measured on a machine.

        Args:
            model: written by ``python -m moeops profile``, read by ``CostModel.load``.
            d_model: ``D``.
            d_hidden: ``H``.
            world_size: ``W``.
            num_projections: weight matrices of an expert: 3 for swiglu, else 2.
            dtype: of tokens and weights.
            node_size: ranks per node, ``None`` for one node.
            backward: count the backward too.
            max_shadows: see above.
        """
        block = (d_model, d_hidden, num_projections, dtype)
        item = dtype.itemsize
        ways = (False, True) if backward else (False,)
        rows = (
            4096  # the model's times grow in proportion to rows; this is far from its fixed costs
        )

        def experts(num_rows: int, num_experts: int = 1) -> float:
            return sum(
                model.expert_seconds(num_rows, *block, backward=way, num_experts=num_experts)
                for way in ways
            )

        def exchange(num_bytes: float) -> float:
            return len(ways) * 2 * model.all_to_all_seconds(num_bytes, world_size, node_size)

        row_seconds = (experts(2 * rows) - experts(rows)) / rows
        # The model counts a rank's own part as sent, the policy only rows that leave the rank.
        sent = rows * d_model * item * world_size / max(world_size - 1, 1)
        weights = num_projections * d_model * d_hidden * item
        # Two stages to every rank, which then has one expert more to read.
        fetch = exchange(weights) + experts(rows, 2) - experts(rows)
        return cls(row_seconds, (exchange(2 * sent) - exchange(sent)) / rows, fetch, max_shadows)

    def __post_init__(self) -> None:
        for name in ("row_seconds", "exchange_seconds", "fetch_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"ShadowPolicy: {name} must be at least 0 and finite, got {value}. Pass seconds."
                )
        _checks.check_int(
            "ShadowPolicy", "max_shadows", self.max_shadows, 1, "Pass shadowing=None for none."
        )


def choose_shadows(counts: Tensor, num_expert: int, policy: ShadowPolicy) -> Tensor:
    """Decide which experts' weights travel: the same everywhere, because every rank sees all counts.

    FasterMoE's rule: go through the experts by load, highest first, and take each as long as the predicted time gets
    less; end at the first with which it does not. The predicted time is that of the slowest rank for its rows and for
    the larger of what it sends and receives, and the time for all weights. Departure: the load of an expert is the
    tokens that go to it; FasterMoE's code counts the tokens that a rank sends.

    Args:
        counts: tokens of each rank for each expert, ``[W, E]`` int64.
        num_expert: ``E_local``.
        policy: costs and bound.

    Returns:
        ``[E]`` bool.

    Host sync: none.  Deterministic: yes, in integers and float64.  Cost: ``(max_shadows + 1) * W`` sums.
    """
    size, num_experts = counts.shape
    load = counts.sum(0)  # [E]
    num_candidates = min(policy.max_shadows, num_experts)
    order = load.sort(descending=True, stable=True).indices[:num_candidates]
    rank = torch.arange(size, device=counts.device)
    owned = torch.div(order, num_expert, rounding_mode="floor").unsqueeze(1) == rank  # [M, W]
    stay = counts[:, order].T.masked_fill(owned, 0)  # [M, W], rows that no longer leave a rank
    come = stay.sum(1, keepdim=True) * owned  # [M, W], rows that no longer come to the owner
    sent = counts.view(size, size, num_expert).sum(2)  # [W, W], from, to
    between = sent.masked_fill(rank.unsqueeze(1) == rank, 0)
    # Each with 0 to M experts taken: [M + 1, W].
    computed = sent.sum(0) + _sums(stay - come)
    exchanged = torch.maximum(between.sum(1) - _sums(stay), between.sum(0) - _sums(come))
    by_rank = computed.double() * policy.row_seconds + exchanged.double() * policy.exchange_seconds
    taken = torch.arange(num_candidates + 1, device=counts.device)
    seconds = by_rank.amax(1) + taken.double() * policy.fetch_seconds
    accepted = (seconds[1:] < seconds[:-1]).long().cumprod(0)
    return torch.zeros_like(load).scatter(0, order, accepted).bool()


def _sums(steps: Tensor) -> Tensor:
    """Sums of the first 0 to M entries of ``[M, W]``."""
    return torch.cat((torch.zeros_like(steps[:1]), steps.cumsum(0)))


class ShadowDispatcher(SharingDispatcher):
    """Rows travel to their experts, but hot experts travel to the rows: ``choose_shadows`` decides in every forward.

    All ranks' counts are gathered, ``W * E`` integers, and every rank comes to the same decision on its device. Tokens
    of the chosen experts stay where they are, and so do the owners'; all other rows take the exact dispatcher's way.
    The weights are on their way while the rows are, and their gradients return likewise: see ``Broadcast`` for the
    bytes. Where no expert is chosen, nothing but the counts is added in eager mode; compiled code runs the exchanges
    of the weights with nothing in them.

    A token's outputs from near and from far are two sums in float32, which are added in the type of the output.

    Args:
        inner: the dispatcher of all other rows.
        policy: costs and bound.

    Attributes:
        hooks: tuple of functions ``hook(chosen)`` called with the decision, ``[E]`` bool on the device, in every
            forward; what they return is ignored.

    Raises:
        NotImplementedError: a gate mixes tokens.
    Host sync: the one copy of ``inner``, with ``W + max_shadows`` integers more.
    """

    option = "shadowing"

    def __init__(self, inner: ExactDispatcher, policy: ShadowPolicy) -> None:
        self.inner: ExactDispatcher = inner
        self.policy = policy
        self.num_expert = inner.num_expert
        self.group = inner.group
        self.max_shadows = min(policy.max_shadows, self.num_expert * self.group.size)
        self.hooks: tuple[Callable[[Tensor], Any], ...] = ()

    def start(
        self, inp: Any, weights: Callable[[], ExpertWeights], table: Tensor | None
    ) -> dict[str, Any]:
        """Begin nothing: which experts travel, the gate decides."""
        return {"weights": weights()}

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        weights: ExpertWeights | None = None,
        *,
        beside: Beside | None = None,
    ) -> Any:
        """Decide, send rows and weights, run this rank's experts, then the others' on this rank's tokens.

        Args:
            routing: what the gate decided.
            inp: nest of ``[T, ...]``.
            experts: this rank's own.
            block: the same as one call.
            weights: from ``start``.
            beside: work to do while tokens, and weights, are on their way.
        """
        assert weights is not None
        if isinstance(routing, SlotRouting):
            raise NotImplementedError(
                "FMoE: shadowing must be None for a gate that mixes tokens, whose experts all have the same load, got "
                f"{self.policy}. Pass shadowing=None, or another gate."
            )
        far, near_ids, chosen = self._decide(routing)
        by_owner = chosen.view(self.group.size, self.num_expert).sum(1)
        extra = torch.cat((by_owner, count_tokens(near_ids, self.max_shadows).long()))
        sent, numbers = self.inner.send(far, inp, block, extra)
        num_sent, near_counts = numbers[: self.group.size], numbers[self.group.size :]
        compiling = torch.compiler.is_compiling()
        total = sum(num_sent)
        if not compiling and total == 0:
            if beside is not None:
                beside()
            return self.inner.join(self.inner.run_and_send_back(sent, experts, block))
        torch._check(total <= self.max_shadows)
        padding = 0
        if compiling:
            # Kernels want one expert at least, and a loop over experts one length.
            padding = self.max_shadows - total if weights.block is None else 1
        broadcast = Broadcast(
            weights.parameters, self._order(chosen), num_sent, padding, self.group
        )
        if beside is not None:
            beside()
        broadcast.spread()
        returns = self.inner.run_and_send_back(sent, experts, block)
        near = self._run_near(
            Routing(near_ids, routing.topk_weights),
            inp,
            weights,
            broadcast,
            near_counts,
            total + padding,
        )
        far_out = self.inner.join(returns)
        return _nests.map_leaves(torch.add, far_out, near)

    def _decide(self, routing: Routing) -> tuple[Routing, Tensor, Tensor]:
        """The routing of rows that travel, shadow numbers of those that do not, ``[T, K]``, and chosen experts."""
        ids = routing.topk_ids
        num_experts = self.num_expert * self.group.size
        counts = all_gather_counts(count_tokens(ids, num_experts), self.group)
        chosen = choose_shadows(counts.long(), self.num_expert, self.policy)
        for hook in self.hooks:
            hook(chosen)
        number = torch.where(chosen, chosen.cumsum(0) - 1, -1)  # [E], in the order of owners
        owner = torch.arange(num_experts, device=ids.device) // self.num_expert
        near = number.masked_fill(owner == self.group.rank, -1)
        near_ids = torch.where(ids < 0, -1, near[ids.clamp(min=0).long()])
        far_ids = torch.where(near_ids < 0, ids, -1)
        return routing._replace(topk_ids=far_ids), near_ids, chosen

    def _order(self, chosen: Tensor) -> Tensor:
        """This rank's experts, those that travel first: ``[E_local]``."""
        own = chosen.narrow(0, self.group.rank * self.num_expert, self.num_expert)
        return own.int().sort(descending=True, stable=True).indices

    def _run_near(self, routing, inp, weights, broadcast, counts, num_experts) -> Any:
        """The outputs of experts that came to this rank's tokens."""
        num_rows = sum(counts)
        torch._check(num_rows <= routing.topk_ids.shape[0] * routing.topk_ids.shape[1])
        plan = sort_tokens(routing.topk_ids, num_experts, num_rows)
        arrived = broadcast.finish()
        if weights.block is not None:
            return weights.block(arrived)(inp, routing.topk_weights, plan)
        rows = _nests.map_leaves(lambda leaf: permute_leaf(leaf, plan), inp)
        counts = counts if torch.compiler.is_compiling() else counts[:num_experts]
        out = weights.run(arrived, rows, plan.expert_offsets, counts)
        return _nests.map_leaves(lambda leaf: combine_leaf(leaf, plan, routing.topk_weights), out)
