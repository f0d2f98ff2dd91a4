"""Ranks that hold the same tokens share the work. T tokens, S ranks in the slice group, L tokens per slice."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _nests
from moeops.comm.groups import RankGroup
from moeops.comm.wires import guarded


def _bounds(num_tokens: int, group: RankGroup) -> tuple[int, int]:
    """First token and number of tokens of this rank's slice; sizes differ by one at most."""
    start = num_tokens * group.rank // group.size
    return start, num_tokens * (group.rank + 1) // group.size - start


def _all_gather(x: Tensor, group: RankGroup) -> Tensor:
    """``[W * x.shape[0], ...]``."""
    ops = torch.ops._c10d_functional

    def gather() -> Tensor:
        return ops.wait_tensor(ops.all_gather_into_tensor(x, group.size, group.name))

    return gather() if torch.compiler.is_compiling() else guarded("join_tokens", group, gather)


def _gather(part: Tensor, num_tokens: int, group: RankGroup) -> Tensor:
    """Join the slices ``[L, ...]`` of all ranks: ``[T, ...]``. Slices travel in buffers of one size."""
    longest = (num_tokens + group.size - 1) // group.size
    padding = (0, 0) * (part.dim() - 1) + (0, longest - part.shape[0])
    buffers = _all_gather(F.pad(part, padding).contiguous(), group)
    buffers = buffers.unflatten(0, (group.size, longest))
    slices = []
    for rank in range(group.size):
        _, length = _bounds(num_tokens, group._replace(rank=rank))
        slices.append(buffers[rank].narrow(0, 0, length))
    return torch.cat(slices)


SLICE_GRADIENTS = ("mean", "fastmoe")


class _Slice(torch.autograd.Function):
    """Take this rank's tokens; the gradients of all slices, divided by ``_Join``'s ``scale``, are joined."""

    @staticmethod
    def forward(ctx, x, group, scale):
        ctx.num_tokens, ctx.group, ctx.scale = x.shape[0], group, scale
        return x.narrow(0, *_bounds(x.shape[0], group)).clone()

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.num_tokens, ctx.group) / ctx.scale, None, None


class _Join(torch.autograd.Function):
    """Join the slices; this rank's slice of the gradient counts ``scale`` times."""

    @staticmethod
    def forward(ctx, part, num_tokens, group, scale):
        ctx.num_tokens, ctx.group, ctx.scale = num_tokens, group, scale
        return _gather(part, num_tokens, group)

    @staticmethod
    def backward(ctx, grad):
        part = grad.narrow(0, *_bounds(ctx.num_tokens, ctx.group))
        return part * ctx.scale, None, None, None


def slice_tokens(inp: Any, group: RankGroup, *, mean: bool = True) -> Any:
    """Take this rank's slice of tokens that every rank of the group holds.

    The slices are as equal as they can be, and no token is left out. Gradients inside the slice are those of the sum
    of the losses of all ranks, which count the same token once each; so parameters used inside are right after their
    gradients are averaged over the ranks, like all others.

    Args:
        inp: nest of ``[T, ...]``, equal on all ranks of the group.
        group: the ranks.
        mean: as said above; otherwise gradients inside the slice are those of this rank's loss, as in FastMoE, and
            right after they are summed over the ranks. The gradient of ``inp`` is the same. ``join_tokens`` needs the
            same value.

    Returns:
        Nest of ``[L, ...]``.

    Gradients: yes; every rank gets that of all tokens.  Host sync: none.
    """
    scale = group.size if mean else 1
    return _nests.map_leaves(lambda leaf: _Slice.apply(leaf, group, scale), inp)


def join_tokens(part: Any, num_tokens: int, group: RankGroup, *, mean: bool = True) -> Any:
    """Join the slices of all ranks: the inverse of ``slice_tokens``.

    Args:
        part: nest of ``[L, ...]``.
        num_tokens: ``T``.
        group: the ranks.
        mean: as for ``slice_tokens``.

    Returns:
        Nest of ``[T, ...]``, equal on all ranks.

    Gradients: yes, from a loss that all ranks compute alike.  Host sync: none.
    """
    scale = group.size if mean else 1
    return _nests.map_leaves(lambda leaf: _Join.apply(leaf, num_tokens, group, scale), part)
