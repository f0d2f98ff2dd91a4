"""Experts that are separate modules, each called on its slice of the rows. R rows in expert order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeops import _nests
from moeops.dispatch.base import split_rows
from moeops.layers import _layer_checks


def loop_over_experts(
    op: str,
    experts: Sequence[Callable[..., Any]],
    counted: Sequence[bool],
    rows: Any,
    expert_offsets: Tensor,
    rows_per_expert: list[int] | None,
) -> Any:
    """Call every expert on its rows, and join what they return; rows without an expert come last, and are zero.

    Args:
        op: the layer's name, for errors.
        experts: one function per expert.
        counted: whether each wants the number of its rows too, an int64 tensor ``[1]`` on the CPU.
        rows: a nest of ``[R, ...]``.
        expert_offsets: ``[E + 1]`` int32.
        rows_per_expert: the same as numbers on the host; ``None`` for one copy from the device.
    """
    all_rows, spec = _nests.flatten(rows)
    counts = _row_counts(all_rows[0].shape[0], expert_offsets, rows_per_expert)
    slices = [split_rows(leaf, counts) for leaf in all_rows]
    outputs: list[list[Tensor]] = []
    out_spec = None
    for index, expert in enumerate(experts):
        part = _nests.unflatten([leaf[index] for leaf in slices], spec)
        args = (part, torch.full((1,), counts[index])) if counted[index] else (part,)
        leaves, this_spec = _nests.flatten(expert(*args))
        if not torch.compiler.is_compiling():
            _layer_checks.check_expert_output(op, index, leaves, counts[index])
        if index == 0:
            out_spec = this_spec
        elif this_spec != out_spec:
            raise ValueError(
                f"{op}: experts must all return the same structure, got {this_spec} from expert {index} and "
                f"{out_spec} from expert 0. Make their outputs alike."
            )
        outputs.append(leaves)
    joined = []
    for parts in zip(*outputs, strict=True):
        if not torch.compiler.is_compiling():
            _layer_checks.check_same_row(op, parts)
        padding = parts[0].new_zeros((counts[-1], *parts[0].shape[1:]))
        joined.append(torch.cat((*parts, padding)))
    return _nests.unflatten(joined, out_spec)


def _row_counts(
    num_rows: int, expert_offsets: Tensor, rows_per_expert: list[int] | None
) -> list[int]:
    """Rows of every expert, and of none."""
    if rows_per_expert is None:
        # One copy to the host, and not one for each of the entries.
        left = num_rows - expert_offsets[-1:]
        counts = torch.cat((expert_offsets.diff(), left)).cpu().tolist()
    else:
        counts = [*rows_per_expert, num_rows - sum(rows_per_expert)]
    for count in counts:
        torch._check(count >= 0)
    torch._check(sum(counts) == num_rows)
    return counts
