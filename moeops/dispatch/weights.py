"""Experts' weights on their way to other ranks. E_local experts on a rank, n of them here, m that travel, W ranks.

There is one copy of an expert's parameters, at its owner. Other ranks get the weights in every forward, through an
exchange whose backward brings their gradients to the owner, where they are summed. So nothing can diverge, and
optimizers, checkpoints and gradient clipping see what they see without copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops import _nests
from moeops.comm.exchange import Exchange
from moeops.comm.groups import RankGroup
from moeops.dispatch.base import Block, Dispatcher
from moeops.dispatch.degrees import Degrees


class ExpertWeights(NamedTuple):
    """A layer's experts as tensors that can travel, and how to run experts that arrived so.

    Attributes:
        parameters: each parameter of the experts on this rank: one tensor ``[E_local, ...]``, or one tensor per expert.
        run: ``run(weights, rows, expert_offsets, counts)``: ``n`` experts with these weights, ``[n, ...]`` per
            parameter, on a nest of rows in their order; ``counts`` are the ``n`` differences of the offsets where the
            host knows them, else ``None``. Every rank must use every weight that it is given, experts without rows
            included: the backward sends gradients of all of them, and a rank that leaves one out keeps the others
            waiting. ``tie`` does it for an expert that is not run.
        block: the same as one call ``block(weights)(x, topk_weights, plan)``, if there is one.
    """

    parameters: Sequence[Tensor | Sequence[Tensor]]
    run: Callable[[list[Tensor], Any, Tensor, Sequence[int] | None], Any]
    block: Callable[[list[Tensor]], Block] | None = None


class SharingDispatcher(Dispatcher):
    """Base of dispatchers that bring experts to other ranks.

    Attributes:
        option: the layer's argument that asks for it.
        inner: what brings tokens to the ranks.
    """

    option: str
    inner: Any

    @property
    def degrees(self) -> Degrees:  # type: ignore[override]  # no subclass sets it
        """Those of ``inner``."""
        return self.inner.degrees


def fused_weights(experts: nn.Module) -> ExpertWeights:
    """Experts whose parameters all have the experts in dimension 0, and that run as one."""
    names = [name for name, _ in experts.named_parameters()]

    def call(weights: list[Tensor], *args: Any, **options: Any) -> Any:
        replaced = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(experts, replaced, args, options)

    def run(weights, rows, expert_offsets, counts):
        return call(weights, rows, expert_offsets=expert_offsets)

    def block(weights):
        return lambda x, topk_weights, plan: call(weights, x, topk_weights, plan)

    return ExpertWeights(list(experts.parameters()), run, block)


# loop(rows, expert_offsets, counts, experts): call one expert after the other on its rows, as it is called at home.
Loop = Callable[[Any, Tensor, list[int] | None, list[Callable[..., Any]]], Any]


def module_weights(experts: Sequence[nn.Module], loop: Loop) -> ExpertWeights:
    """Experts that are modules of the same structure: the first one runs with the weights of others."""
    first = experts[0]
    names = [name for name, _ in first.named_parameters()]
    columns = zip(*(list(expert.parameters()) for expert in experts), strict=True)

    def expert_with(replaced: dict[str, Tensor]) -> Callable[..., Any]:
        return lambda *args: torch.func.functional_call(first, replaced, args)

    def run(weights, rows, expert_offsets, counts):
        # unbind, because its gradient is one stack and not one padded tensor per expert.
        by_expert = zip(*(leaf.unbind(0) for leaf in weights), strict=True)
        callers = [expert_with(dict(zip(names, values, strict=True))) for values in by_expert]
        return loop(rows, expert_offsets, None if counts is None else list(counts), callers)

    return ExpertWeights(list(columns), run)


def check_fused(op: str, option: str, experts: nn.Module) -> None:
    """All parameters are of experts: another module's, such as an activation's, belong to the rank."""
    for name, _ in (*experts.named_parameters(), *experts.named_buffers()):
        if "." in name:
            raise NotImplementedError(
                f"{op}: the activation must have no parameters and buffers for {option}, because they belong to a "
                f"rank and to no expert, got {name!r}. Leave {option} out, or pass another activation."
            )


def check_modules(op: str, option: str, experts: Sequence[nn.Module]) -> tuple[Any, ...]:
    """The experts can stand in for one another; what must be equal on all ranks is returned."""
    structures = [_structure(op, option, index, expert) for index, expert in enumerate(experts)]
    for index, structure in enumerate(structures):
        if structure != structures[0]:
            raise NotImplementedError(
                f"{op}: experts must have the same structure for {option}, got {experts[0]} as expert 0 and "
                f"{experts[index]} as expert {index}. Make them alike, or leave {option} out."
            )
    return structures[0]


def _structure(op: str, option: str, index: int, expert: nn.Module) -> tuple[Any, ...]:
    """What experts must have in common: modules with their printed options, and parameters."""
    parameters = list(expert.named_parameters())
    if not parameters:
        raise NotImplementedError(
            f"{op}: experts must have parameters for {option}, got {expert} as expert {index}. Leave {option} out."
        )
    for name, _ in expert.named_buffers():
        raise NotImplementedError(
            f"{op}: experts must have no buffers for {option}, because they would not travel, got {name!r} in "
            f"expert {index}. Make it a parameter or a constant, or leave {option} out."
        )
    shapes = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in parameters]
    return (repr(expert), *shapes)


class Held:
    """Weights that travel: construction begins it, ``finish`` waits.

    Several parameters are several exchanges, so that what arrives is used where it lies.

    Args:
        rows: per parameter, what this rank sends, ``[m, ...]``.
        input_splits, output_splits: experts to and from each rank.
        group: the ranks, more than one.
    """

    def __init__(
        self,
        rows: list[Tensor],
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        group: RankGroup,
    ) -> None:
        self._exchanges = [Exchange(leaf, input_splits, output_splits, group) for leaf in rows]
        self._weights: list[Tensor] | None = None

    def finish(self) -> list[Tensor]:
        """Return the weights that arrived, by rank, the same ones at every call."""
        if self._weights is None:
            self._weights = [exchange.finish() for exchange in self._exchanges]
        return self._weights


def send_experts(
    parameters: Sequence[Tensor | Sequence[Tensor]],
    experts: Sequence[int],
    input_splits: Sequence[int],
    output_splits: Sequence[int],
    group: RankGroup,
) -> Held:
    """Begin to send experts that the host knows, in this order; one may go to several ranks.

    A rank that sends nothing keeps its parameters in the graph, so that all ranks' backwards hold the same exchanges.
    """
    check_whole(parameters)
    rows = []
    for parameter in parameters:
        if not experts:
            empty = parameter if isinstance(parameter, Tensor) else parameter[0].unsqueeze(0)
            rows.append(empty.narrow(0, 0, 0))
            continue
        each = parameter.unbind(0) if isinstance(parameter, Tensor) else parameter
        rows.append(torch.stack([each[index] for index in experts]))
    return Held(rows, input_splits, output_splits, group)


class Broadcast:
    """Experts on their way to all ranks, which the device has chosen; the host knows how many each rank sends.

    In two stages, as a large broadcast is best done: owners send every rank one W-th of each expert, then all ranks
    send all others what they have. Each rank sends ``(m_own + m) * P * (W - 1) / W`` bytes for experts of ``P`` bytes,
    and not ``m_own * P * (W - 1)``; the backward sends the gradients by the same stages back, as many bytes.

    Args:
        parameters: as in ``ExpertWeights``.
        order: this rank's experts, those that travel first, ``[E_local]``.
        num_sent: how many of each rank travel.
        padding: experts of zeros behind those that arrive.
        group: the ranks, more than one.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor | Sequence[Tensor]],
        order: Tensor,
        num_sent: Sequence[int],
        padding: int,
        group: RankGroup,
    ) -> None:
        check_whole(parameters)
        self._group = group
        self._total = sum(num_sent)
        self._padding = padding
        own = num_sent[group.rank]
        torch._check(own <= order.shape[0])
        index = order.narrow(0, 0, own)
        self._shapes = []
        pieces = []
        for parameter in parameters:
            every = parameter if isinstance(parameter, Tensor) else torch.stack(list(parameter))
            self._shapes.append(every.shape[1:])
            size = every.shape[1:].numel()
            piece = -(-size // group.size)
            rows = every.index_select(0, index).reshape(own, size)
            rows = F.pad(rows, (0, piece * group.size - size))
            by_rank = rows.view(own, group.size, piece).transpose(0, 1)
            pieces.append(by_rank.reshape(group.size * own, piece))
        self._held = Held(pieces, [own] * group.size, list(num_sent), group)

    def spread(self) -> None:
        """Wait for the first stage, and begin the second."""
        splits = [self._total] * self._group.size
        copies = []
        for pieces in self._held.finish():  # [m, piece]
            total, piece = self._total, pieces.shape[1]
            every = pieces.unsqueeze(0).expand(self._group.size, total, piece)
            copies.append(every.reshape(self._group.size * total, piece))
        self._held = Held(copies, splits, splits, self._group)

    def finish(self) -> list[Tensor]:
        """Return the experts' weights, ``[m + padding, ...]``, by rank and number."""
        weights = []
        for received, shape in zip(self._held.finish(), self._shapes, strict=True):
            size, total, piece = self._group.size, self._total, received.shape[1]
            by_expert = received.view(size, total, piece).transpose(0, 1)
            by_expert = by_expert.reshape(total, size * piece).narrow(1, 0, shape.numel())
            if torch.compiler.is_compiling():
                by_expert = torch.cat(
                    (by_expert, by_expert.new_zeros(self._padding, shape.numel()))
                )
            weights.append(by_expert.reshape(total + self._padding, *shape))
        return weights


def check_whole(parameters: Sequence[Tensor | Sequence[Tensor]]) -> None:
    """The parameters are there, and not shards of them."""
    for leaf in _nests.leaves(list(parameters)):
        if hasattr(leaf, "device_mesh"):
            raise NotImplementedError(
                "FMoE: experts whose weights travel between ranks must not be sharded with fully_shard, got "
                f"{leaf.placements} on {leaf.device_mesh}. Shard the other modules, or pass replicas=None and "
                "shadowing=None."
            )


class _Tie(torch.autograd.Function):
    """Return ``out`` as it is, as if it depended on the other tensors."""

    @staticmethod
    def forward(ctx, out, *others):
        ctx.others = [(other.shape, other.dtype) for other in others]
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.others)


def tie(out: Any, weights: list[Tensor]) -> Any:
    """Keep weights that a rank has no use for in the graph: all ranks' backwards must hold the same exchanges."""
    leaves, spec = _nests.flatten(out)
    for index, leaf in enumerate(leaves):
        if leaf.is_floating_point():
            leaves[index] = _Tie.apply(leaf, *weights)
            break
    return _nests.unflatten(leaves, spec)
