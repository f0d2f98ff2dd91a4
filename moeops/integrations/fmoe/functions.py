"""FastMoE's functions below its layers. T tokens, K experts per token, E experts, E_local on a rank, W ranks, R rows.

A rank receives rows expert by expert, and of each expert rank by rank, which is FastMoE's order. Counts are int64:
``local`` ones ``[E]`` say what this rank sends to each expert, ``global`` ones ``[W * E_local]`` what it receives, rank
by rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks
from moeops.comm.exchange import all_to_all_rows, exchange_counts
from moeops.comm.groups import rank_group
from moeops.comm.slicing import join_tokens, slice_tokens
from moeops.integrations.fmoe._settings import function_group, get_group, set_group
from moeops.integrations.fmoe.utils import get_torch_default_comm
from moeops.ops.grouped_linear import grouped_linear
from moeops.ops.sorting import count_tokens, sort_tokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def ensure_comm(t: Tensor, comm: ProcessGroup | None) -> None:
    """Name the group that the functions here use from here on.

    Args:
        t: not used: nothing is made on its device, there are no handles of NCCL's.
        comm: the ranks that hold the experts; ``None`` for the whole job. FastMoE heeds the first call only.

    Raises:
        RuntimeError: ``comm`` is ``None`` and torch.distributed is not initialised.
    """
    set_group(get_torch_default_comm() if comm is None else comm)


def get_moe_group() -> ProcessGroup | None:
    """The group that ``ensure_comm`` was told, the whole job's if it was not called, ``None`` if there is none."""
    return get_group()


def count_by_gate(
    gate: Tensor, num_expert: int, world_size: int, require_pos: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Count the pairs of each expert, here and coming from other ranks, and sort them.

    Args:
        gate: chosen experts, int64 or int32 of any shape, -1 for a dropped one.
        num_expert: ``E_local``.
        world_size: ``W``.
        require_pos: sort too, for a host copy.

    Returns:
        Places of the kept pairs in ``gate``, flattened, expert by expert, in the order of tokens (FastMoE's order
        within an expert is arbitrary), int64, or ``None``; the local counts; the global counts. On the device of
        ``gate``.

    Raises:
        ValueError: there is no group of ``world_size`` ranks.  TypeError: ``gate`` is no integer tensor.
    """
    group = function_group("count_by_gate", world_size)
    num_experts = num_expert * world_size
    pairs = gate.reshape(-1, 1)
    local = count_tokens(pairs, num_experts).to(torch.int64)
    received = exchange_counts(local.view(world_size, num_expert), group).reshape(-1)
    if not require_pos:
        return None, local, received
    plan = sort_tokens(pairs, num_experts)
    kept = int(plan.expert_offsets[-1])
    return plan.row_to_pair[:kept].to(torch.int64), local, received


def prepare_forward(
    gate: Tensor, num_expert: int, world_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """What ``MOEScatter``, experts and ``MOEGather`` need to know of chosen experts.

    Takes what ``count_by_gate`` takes, and copies to the host twice.

    Returns:
        The places of ``count_by_gate``; local and global counts, and the rows of each expert here ``[E_local]``, all
        on the CPU; the rows of all experts here.
    """
    pos, local, received = count_by_gate(gate, num_expert, world_size)
    assert pos is not None
    local, received = torch.stack((local, received)).cpu()
    rows = received.view(world_size, num_expert).sum(0)
    return pos, local, received, rows, int(rows.sum())


def _splits(local: Tensor, received: Tensor, world_size: int) -> tuple[list[int], list[int]]:
    """Rows to and from each rank."""
    sent, arriving = (counts.view(world_size, -1).sum(1).tolist() for counts in (local, received))
    return sent, arriving


def _by_expert(received: Tensor, world_size: int) -> Tensor:
    """Index that sorts rows that arrived rank by rank into FastMoE's order, expert by expert: ``[R]``."""
    sizes = received.cpu()
    starts = (sizes.cumsum(0) - sizes).view(world_size, -1).t().flatten()
    sizes = sizes.view(world_size, -1).t().flatten()
    shift = starts - (sizes.cumsum(0) - sizes)
    return torch.arange(int(sizes.sum())) + shift.repeat_interleave(sizes)


class MOEScatter:
    """Send rows to their experts; call ``MOEScatter.apply``, as that of FastMoE's autograd function."""

    @staticmethod
    def apply(
        inp: Tensor,
        pos: Tensor,
        local_expert_count: Tensor,
        global_expert_count: Tensor,
        fwd_batch_size: int,
        world_size: int,
    ) -> Tensor:
        """Copy rows into expert order, and send them.

        Args:
            inp: rows of this rank, ``[B, ...]``.
            pos: which of them to send, in the order of experts; one may be sent several times.
            local_expert_count: ``[E]``.
            global_expert_count: ``[W * E_local]``.
            fwd_batch_size: ``R``, the rows that arrive.
            world_size: ``W``.

        Returns:
            ``[R, ...]``, expert by expert.

        Raises:
            ValueError: the counts do not fit.
        Gradients: ``inp``.  Host sync: none for counts on the CPU.
        """
        rows = inp.index_select(0, pos)
        if world_size > 1:
            group = function_group("MOEScatter", world_size)
            splits = _splits(local_expert_count, global_expert_count, world_size)
            received = all_to_all_rows(rows, *splits, group)
            order = _by_expert(global_expert_count, world_size).to(inp.device)
            rows = received.index_select(0, order)
        if rows.shape[0] != fwd_batch_size:
            raise ValueError(
                f"MOEScatter: fwd_batch_size must be the {rows.shape[0]} rows that arrive, got {fwd_batch_size}. Pass "
                "what prepare_forward returned."
            )
        return rows


class MOEGather:
    """Bring rows back; call ``MOEGather.apply``, as that of FastMoE's autograd function."""

    @staticmethod
    def apply(
        global_output_buf: Tensor,
        pos: Tensor,
        local_expert_count: Tensor,
        global_expert_count: Tensor,
        local_batch_size: int,
        world_size: int,
    ) -> Tensor:
        """Do the inverse of ``MOEScatter``.

        Args:
            global_output_buf: ``[R, ...]``, expert by expert.
            pos: where the rows belong, each place once.
            local_expert_count: ``[E]``.
            global_expert_count: ``[W * E_local]``.
            local_batch_size: rows of the result.
            world_size: ``W``.

        Returns:
            ``[local_batch_size, ...]``, zeros where no row belongs.

        Gradients: ``global_output_buf``.  Host sync: none for counts on the CPU.
        """
        rows = global_output_buf
        if world_size > 1:
            group = function_group("MOEGather", world_size)
            order = _by_expert(global_expert_count, world_size).to(rows.device)
            by_rank = torch.empty_like(order)
            by_rank[order] = torch.arange(order.shape[0], device=order.device)
            sent, received = _splits(local_expert_count, global_expert_count, world_size)
            rows = all_to_all_rows(rows.index_select(0, by_rank), received, sent, group)
        return rows.new_zeros((local_batch_size, *rows.shape[1:])).index_copy(0, pos, rows)


class MOELinear:
    """One matrix per expert; call ``MOELinear.apply``, as that of FastMoE's autograd function."""

    @staticmethod
    def apply(
        global_input_buf: Tensor,
        fwd_expert_count: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply rows ``[R, in]`` in expert order by ``weight [E, out, in]``, and add ``bias [E, out]``."""
        counts = fwd_expert_count.to(device=global_input_buf.device)
        expert_offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return grouped_linear(global_input_buf, weight, expert_offsets, bias=bias)


class Slice:
    """Take this rank's slice of the tokens; call ``Slice.apply``, as that of FastMoE's autograd function."""

    @staticmethod
    def apply(inp: Tensor, rank: int, world_size: int, group: ProcessGroup | None) -> Tensor:
        """``[T, ...]`` to ``[T / S, ...]``; the gradient is that of all slices, joined.

        Raises:
            ValueError: ``T`` is no multiple of the ranks (FastMoE drops the remainder), or the group is another one.
        """
        ranks = _slice_group("Slice", rank, world_size, group)
        if inp.shape[0] % world_size:
            raise ValueError(
                f"Slice: inp must have a multiple of {world_size} rows, got {inp.shape[0]}. Pad it, or use a layer's "
                "slice_group, which takes any number."
            )
        return inp if ranks is None else slice_tokens(inp, ranks, mean=False)


class AllGather:
    """Join the slices of all ranks; call ``AllGather.apply``, as that of FastMoE's autograd function."""

    @staticmethod
    def apply(inp: Tensor, rank: int, world_size: int, group: ProcessGroup | None) -> Tensor:
        """``[L, ...]`` to ``[L * S, ...]``; the gradient is that of this rank's slice."""
        ranks = _slice_group("AllGather", rank, world_size, group)
        if ranks is None:
            return inp
        return join_tokens(inp, inp.shape[0] * world_size, ranks, mean=False)


def _slice_group(op: str, rank: int, world_size: int, group: ProcessGroup | None) -> Any:
    if world_size == 1:
        return None
    found = rank_group(get_group() if group is None else group)
    if found is None or (found.size, found.rank) != (world_size, rank):
        raise ValueError(
            f"{op}: group must have {world_size} ranks with this one as number {rank}, got {_checks.describe(found)}. "
            "Pass the group's own size and rank."
        )
    return found


def _local_scatter(inp: Tensor, pos: Tensor) -> Tensor:
    """Copy rows into expert order."""
    return inp.index_select(0, pos)


def _local_gather(
    inp: Tensor, pos: Tensor, out_batch_size: int, maybe_overlap: bool = True
) -> Tensor:
    """Bring rows back from expert order, summed where ``maybe_overlap`` and several have one place."""
    out = inp.new_zeros((out_batch_size, *inp.shape[1:]))
    return out.index_add(0, pos, inp) if maybe_overlap else out.index_copy(0, pos, inp)
