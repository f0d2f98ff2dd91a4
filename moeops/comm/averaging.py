"""Gradients that are averaged over ranks where they arise, as part of the backward. W ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.comm.groups import RankGroup, process_group, rank_group
from moeops.comm.wires import guarded

_library = torch.library.Library("moeops", "FRAGMENT")
_library.define(
    "average_gradient(Tensor(a) x, str group_name, int group_size, bool in_float32) -> Tensor(a)"
)


class _AverageGradient(torch.autograd.Function):
    """Nothing in the forward; in the backward, the mean over the ranks of their gradients."""

    @staticmethod
    def forward(ctx, x, group_name, group_size, in_float32):
        ctx.arguments = group_name, group_size, in_float32
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _average(grad, *ctx.arguments), None, None, None


def _average(grad, group_name, group_size, in_float32):
    ops = torch.ops._c10d_functional
    dtype = grad.dtype
    if in_float32 and dtype in (torch.float16, torch.bfloat16):
        grad = grad.float()

    def run():
        # Division first: a sum of half types could overflow.
        return ops.wait_tensor(ops.all_reduce((grad / group_size).contiguous(), "sum", group_name))

    if torch.compiler.is_compiling():
        return run().to(dtype)
    group = rank_group(process_group(group_name))
    assert group is not None
    return guarded("average_gradient", group, run).to(dtype)


# Composite: below autograd a graph holds torch's all-reduce and its wait, which passes may move.
_library.impl(
    "average_gradient", lambda *args: _AverageGradient.apply(*args), "CompositeImplicitAutograd"
)


def average_gradient(x: Tensor, group: RankGroup, *, in_float32: bool = False) -> Tensor:
    """Return ``x``, whose gradient will be the mean of the ranks' gradients.

    An all-reduce is begun and waited for where the backward has computed the gradient. In compiled code it is a part of
    the backward's graph.

    Args:
        x: any shape, a float type; the same shape and dtype on every rank. All ranks must compute a gradient of it.
        group: the ranks.
        in_float32: reduce half types in float32.

    Returns:
        A view of ``x``.

    Raises:
        RuntimeError: in the backward, outside of compiled code: a rank did not take part within the group's time-out.
    Gradients: ``x``.  Host sync: none.  Deterministic: as the backend's all-reduce is.
    """
    if group.size == 1:
        return x
    return torch.ops.moeops.average_gradient(x, group.name, group.size, in_float32)
