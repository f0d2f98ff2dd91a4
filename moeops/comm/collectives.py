"""Collectives without gradients, in the one spelling that eager mode and every compiler agree on. W ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeops.comm.groups import RankGroup, rank_group
from moeops.comm.wires import guarded, without_autograd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_gather_counts(x: Tensor, group: ProcessGroup | RankGroup | None) -> Tensor:
    """Collect the same small tensor from every rank.

    Args:
        x: any shape and dtype, the same on every rank.
        group: a process group, ``rank_group`` of one, or ``None`` for this rank alone.

    Returns:
        ``[W, *x.shape]``, entry ``r`` from the group's rank ``r``; dtype of ``x``.

    Gradients: none, the result is detached.  Host sync: none.  Deterministic: yes.

    Example:
        >>> all_gather_counts(torch.tensor([3, 1]), None).tolist()
        [[3, 1]]
    """
    group = rank_group(group)
    x = x.detach().unsqueeze(0)
    if group is None or group.size == 1:
        return x.clone()
    return _collective(
        "all_gather_counts", group, "all_gather_into_tensor", x.contiguous(), group.size
    )


def all_reduce_sum(x: Tensor, group: ProcessGroup | RankGroup | None) -> Tensor:
    """Sum a tensor over the ranks.

    Args:
        x: any shape and number type, the same on every rank.
        group: a process group, ``rank_group`` of one, or ``None`` for this rank alone.

    Returns:
        The sum, the same on every rank: shape and dtype of ``x``.

    Gradients: none, the result is detached.  Host sync: none.  Deterministic: as the backend's all-reduce is.

    Example:
        >>> all_reduce_sum(torch.tensor([3, 1]), None).tolist()
        [3, 1]
    """
    group = rank_group(group)
    x = x.detach()
    if group is None or group.size == 1:
        return x.clone()
    return _collective("all_reduce_sum", group, "all_reduce", x.contiguous(), "sum")


def _collective(op: str, group: RankGroup, name: str, *args: Any) -> Tensor:
    """Run a functional collective; outside of compiled code an error names ``op``."""
    ops = torch.ops._c10d_functional

    def run() -> Tensor:
        return ops.wait_tensor(getattr(ops, name)(*args, group.name))

    if torch.compiler.is_compiling():
        return run()
    with without_autograd():
        return guarded(op, group, run)
