"""Gradients clipped by a norm over all ranks, in which every expert counts once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeops.comm.groups import RankGroup
from moeops.comm.wires import guarded
from moeops.layers.walk import named_layers


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of all gradients of a model whose experts are spread over ranks.

    ``torch.nn.utils.clip_grad_norm_`` on each rank would see that rank's experts only, and every rank would scale by
    another factor. Here each expert counts once, on whichever rank it is, and everything else counts once too. Call it
    on every rank, after the gradients are averaged.

    Args:
        model: holds ``moeops.FMoE`` layers; all other gradients are taken to be equal on all ranks.
        max_norm: norm to clip to.
        norm_type: order of the norm, ``math.inf`` for the largest entry.
        error_if_nonfinite: raise where the norm is not finite, on every rank, for a host copy.
        foreach: as in torch.

    Returns:
        The norm before clipping, a scalar, the same on every rank.

    Raises:
        TypeError: ``model`` is no module.  RuntimeError: the norm is not finite and ``error_if_nonfinite``; or a rank
        did not take part within its group's time-out.
    Host sync: none without ``error_if_nonfinite``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"clip_grad_norm_: model must be a module, got {type(model).__name__}. Pass the model, which knows "
            "whose parameters are experts', and not its parameters."
        )
    holders: dict[nn.Parameter, RankGroup] = {}
    for _, layer in named_layers(model):
        if layer.moe_ranks is not None:
            holders.update(dict.fromkeys(layer.experts.parameters(), layer.moe_ranks))
    # DTensors of different meshes do not mix; neither do experts of different groups.
    classes: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        classes.setdefault((holders.get(parameter), mesh), []).append(parameter)
    norm_type = float(norm_type)
    norms = []
    for (group, _), parameters in classes.items():
        norm = _norm(parameters, norm_type, foreach)
        norms.append(norm if group is None else _over_ranks(norm, norm_type, group))
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    total = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of the gradients must be finite, got {float(total)}. Look for NaN in the loss, "
            "or pass error_if_nonfinite=False."
        )
    for parameters in classes.values():
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total, foreach)
    return total


def _norm(parameters: list[nn.Parameter], norm_type: float, foreach: bool | None) -> Tensor:
    """Norm of the gradients of some parameters, float32 or float64."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, norm_type, False, foreach)
    if hasattr(norm, "full_tensor"):  # sharded by FSDP2
        norm = norm.full_tensor()
    dtype = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    return norm.to(parameters[0].device, dtype)


def _over_ranks(norm: Tensor, norm_type: float, group: RankGroup) -> Tensor:
    """Norm over the ranks of a group of each rank's norm."""
    ops = torch.ops._c10d_functional

    def gather() -> Tensor:
        mine = norm.reshape(1)
        return ops.wait_tensor(ops.all_gather_into_tensor(mine, group.size, group.name))

    every = guarded("clip_grad_norm_", group, gather)
    return torch.linalg.vector_norm(every, norm_type)
