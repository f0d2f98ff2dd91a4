"""FastMoE's gates on moeops'. T tokens, K experts per token, E experts, D model width, W ranks.

All return scores in the type of their input, as FastMoE's do; moeops' own return float32. ``compat=None`` means what
``install`` was told; what FastMoE's numbers are is in the docstrings of ``moeops.gates``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeops import gates
from moeops.comm.collectives import all_gather_counts
from moeops.comm.exchange import exchange_counts
from moeops.gates.base import BaseGate
from moeops.gates.functional import local_queues
from moeops.integrations.fmoe._settings import function_group, use_compat

__all__ = [
    "BaseGate",
    "DCGate",
    "FasterGate",
    "GShardGate",
    "NaiveGate",
    "NoisyGate",
    "SwipeGate",
    "SwitchGate",
    "ZeroGate",
    "gen_faster_gate",
    "limit_by_capacity",
]


class _InputType(BaseGate):
    """Scores in the type of the input."""

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # any gate
        topk_ids, scores, *rest = super().forward(inp, *args, **kwargs)
        return (topk_ids, scores.to(inp.dtype), *rest)


class _TorchSoftmax(BaseGate):
    """With ``compat`` scores are the bits of torch's softmax; the kernels' may differ in the last one."""

    compat: bool
    over_all = False  # over the logits of all experts, and not over the chosen ones
    _route: tuple[Tensor | None, Tensor | None] = (None, None)

    def set_loss(
        self,
        loss: Tensor | None,
        logits: Tensor | None = None,
        topk_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._route = (logits, topk_ids)
        super().set_loss(loss, logits, topk_ids, mask)

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # any gate
        topk_ids, scores, *rest = super().forward(inp, *args, **kwargs)
        (logits, chosen), self._route = self._route, (None, None)
        if self.compat and logits is not None and chosen is not None:
            ids = chosen.clamp_min(0)
            over = logits if self.over_all else logits.gather(1, ids)
            bits = over.softmax(-1)
            bits = bits.gather(1, ids) if self.over_all else bits
            scores = torch.where(chosen < 0, scores, bits)  # those of masked tokens stay
        return (topk_ids, scores, *rest)


class _DummyLoss(BaseGate):
    """A loss of zero, ``[1]``, where the gate has none, so that the losses of all gates can be joined."""

    def set_loss(
        self,
        loss: Tensor | None,
        logits: Tensor | None = None,
        topk_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if loss is None and logits is not None:
            # The sum of no logit: with a gradient, as FastMoE's.
            loss = logits.reshape(-1)[:0].sum().reshape(1)
        super().set_loss(loss, logits, topk_ids, mask)


class _OldShapes(BaseGate):
    """With ``compat`` ids ``[T * K]`` and scores ``[T, 1, K]``."""

    compat: bool

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # any gate
        topk_ids, scores = super().forward(inp, *args, **kwargs)
        return (topk_ids.reshape(-1), scores.unsqueeze(1)) if self.compat else (topk_ids, scores)


class NaiveGate(_InputType, _TorchSoftmax, _DummyLoss, gates.NaiveGate):
    """``moeops.gates.NaiveGate`` with a dummy loss."""

    def __init__(self, *args: Any, compat: bool | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.compat = use_compat(compat)


class ZeroGate(_OldShapes, _InputType, gates.ZeroGate):
    """``moeops.gates.ZeroGate``; with ``compat`` its ids are flat."""

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        compat: bool | None = None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k)
        self.compat = use_compat(compat)


class NoisyGate(_OldShapes, _InputType, gates.NoisyGate):
    """``moeops.gates.NoisyGate``; with ``compat`` its ids are flat, and the loss has FastMoE's variance."""

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        compat: bool | None = None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, compat=use_compat(compat))


class GShardGate(_InputType, _TorchSoftmax, gates.GShardGate):
    """``moeops.gates.GShardGate``."""

    def __init__(self, *args: Any, compat: bool | None = None, **options: Any) -> None:
        super().__init__(*args, compat=use_compat(compat), **options)


class DCGate(_InputType, _TorchSoftmax, gates.DCGate):
    """``moeops.gates.DCGate``."""

    def __init__(self, *args: Any, compat: bool | None = None, **options: Any) -> None:
        super().__init__(*args, compat=use_compat(compat), **options)


class SwitchGate(_InputType, _TorchSoftmax, gates.SwitchGate):
    """``moeops.gates.SwitchGate``; with ``compat`` the jitter is added to the logits, and the capacity is global."""

    over_all = True

    def __init__(self, *args: Any, compat: bool | None = None, **options: Any) -> None:
        if use_compat(compat):
            options = {"jitter": "logits", "global_capacity": True, **options}
        super().__init__(*args, compat=use_compat(compat), **options)


class SwipeGate(_InputType, _DummyLoss, gates.SwipeGate):
    """``moeops.gates.SwipeGate`` with a dummy loss, and FastMoE's single step."""

    @torch.no_grad()
    def swipe_once(self, idx: Tensor, capacity: Tensor | int, bias: int) -> tuple[Tensor, Tensor]:
        """Redirect the pairs of one choice that their ranks cannot take.

        Args:
            idx: one expert for each token, ``[T]``, int64.
            capacity: pairs that this rank can take; the ranks tell each other.
            bias: redirected pairs go to expert ``bias mod num_expert`` of a rank.

        Returns:
            The experts after that ``[T]``, and what this rank can still take, a scalar on the CPU.
        """
        group = self._moe_group("rank balancing")
        own = torch.as_tensor(capacity, dtype=torch.int64, device=idx.device).reshape(())
        room = all_gather_counts(own, group)  # [W]
        moved, room = self.balance_choice(idx, room, bias)
        return moved, room[0 if group is None else group.rank].cpu()


class FasterGate(_InputType, gates.FasterGate):
    """``moeops.gates.FasterGate`` with FastMoE's arguments and its environment variables.

    ``FMOE_TOPO_GPUS_PER_NODE`` and ``FMOE_TOPO_OUTGOING_FRACTION`` are read when the gate is built.

    Args:
        d_model: ``D``.
        n_expert: experts on this rank.
        world_size: ranks that hold different experts.
        node_rank: number of this rank's node.
        gate_bias: give the router a bias.
        compat: FastMoE's scale of the loss.
        **options: of ``moeops.gates.FasterGate``.
    """

    def __init__(
        self,
        d_model: int,
        n_expert: int,
        world_size: int,
        node_rank: int,
        gate_bias: bool = True,
        *,
        compat: bool | None = None,
        **options: Any,
    ) -> None:
        options = {**gates.FasterGate.environment(), **options}
        options.setdefault("top_k", 2)
        super().__init__(
            d_model,
            n_expert,
            world_size,
            gate_bias=gate_bias,
            node_rank=node_rank,
            compat=use_compat(compat),
            **options,
        )


def gen_faster_gate(rank: int) -> Callable[..., FasterGate]:
    """Make a layer's ``gate=`` argument: a function that builds the ``FasterGate`` of a rank."""
    node_rank = rank // gates.FasterGate.environment()["gpus_per_node"]

    def build(
        d_model: int, n_expert: int, world_size: int, top_k: int = 2, gate_bias: bool = True
    ) -> FasterGate:
        return FasterGate(d_model, n_expert, world_size, node_rank, gate_bias, top_k=top_k)

    return build


@torch.no_grad()
def limit_by_capacity(
    topk_idx: Tensor, num_expert: int, world_size: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the pairs that do not fit into the experts of all ranks.

    Args:
        topk_idx: chosen experts, int64 of any shape, -1 for a dropped pair.
        num_expert: experts on a rank.
        world_size: ``W``; the group is that of ``fmoe.functions.ensure_comm``.
        capacity: pairs of an expert, those of all ranks together: earlier ranks come first, then earlier places
            (FastMoE leaves the order to chance).

    Returns:
        Pairs that this rank sends to each expert ``[E]`` and that it receives ``[W * E / W]``, int64; the ids with -1
        for what was dropped.
    """
    group = function_group("limit_by_capacity", world_size)
    num_experts = num_expert * world_size
    places, _, counts, _, _ = local_queues(topk_idx.reshape(-1, 1), num_experts, "position", None)
    wanted = exchange_counts(counts.reshape(world_size, num_expert), group)  # [from, E_local]
    ahead = wanted.cumsum(0) - wanted
    received = torch.minimum(wanted, (capacity - ahead).clamp_min(0))
    sent = exchange_counts(received, group).reshape(-1)  # [E]
    allowed = sent[topk_idx.clamp_min(0)]
    kept = torch.where(places.reshape(topk_idx.shape) < allowed, topk_idx, -1)
    return sent, received.reshape(-1), kept
