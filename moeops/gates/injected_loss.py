"""Auxiliary losses whose gradient enters the backward at a layer's output, so that nobody has to add them to a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeops import _checks, _nests
from moeops.gates.base import BaseGate


class _Inject(torch.autograd.Function):
    """Pass ``y`` on; the backward gives ``loss`` the gradient 1, as if it had been added to the loss."""

    @staticmethod
    def forward(y, loss):
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, loss = inputs
        ctx.dtype, ctx.device = loss.dtype, loss.device

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), dtype=ctx.dtype, device=ctx.device)


def inject_auxiliary_loss(model: nn.Module, scale: float | Tensor | None = 1.0) -> None:
    """Let the losses of a model's gates enter the backward by themselves, from the next forward on.

    Each layer adds ``scale`` times the gradient of its gate's loss to the backward that reaches the layer's output.
    ``moeops.auxiliary_loss`` has nothing to add then: it returns 0. This is for models whose loss is out of a layer's
    reach: stages of a pipeline, all of whose micro-batches count, and layers that are called several times in one
    forward, each call of which counts. It works in recomputation by activation checkpointing, the re-entrant kind
    included, and under ``torch.compile``.

    The result is the gradient of ``loss + scale * (sum of the gates' losses)`` for a backward that starts with gradient
    1. Where the loss is multiplied first (by a ``GradScaler``, or by 1 / micro-batches of gradient accumulation) the
    scale must be too. ``torch.distributed.pipelining`` divides all gradients by the micro-batches after the last one,
    unless it is told ``scale_grads=False``, so the scale there is the weight of the mean over micro-batches.

    Args:
        model: any module; every ``BaseGate`` that is the gate of an ``FMoE`` layer or in a wrapper of it takes part.
        scale: factor, or a scalar tensor, which can change without another compilation; ``None`` ends it.

    Raises:
        TypeError: ``model`` is not a module, or ``scale`` no number.
    Host sync: none.
    Source: ``MoEAuxLossAutoScaler`` of Megatron-Core.

    Example:
        >>> from moeops import FMoETransformerMLP
        >>> from moeops.gates import SwitchGate
        >>> layer = FMoETransformerMLP(4, 8, 16, top_k=1, gate=SwitchGate)
        >>> inject_auxiliary_loss(layer, 1e-2)
        >>> layer(torch.randn(5, 8)).sum().backward()
        >>> layer.gate.has_loss
        False
    """
    op = "inject_auxiliary_loss"
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {_checks.describe(model)}. Pass the module that holds the "
            "gates."
        )
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not (scale is None or number or (isinstance(scale, Tensor) and scale.numel() == 1)):
        raise TypeError(
            f"{op}: scale must be a number, a scalar tensor or None, got {_checks.describe(scale)}. Pass the weight of "
            "the gates' losses."
        )
    for module in model.modules():
        if isinstance(module, BaseGate):
            module.loss_scale = scale


def with_gate_losses(gate: nn.Module, out: Any) -> Any:
    """A layer's output, a nest of tensors, with the losses that its gate injects."""
    for module in gate.modules():
        if not isinstance(module, BaseGate) or module.loss_scale is None:
            continue
        loss = module.take_injected()
        if loss is None or not loss.requires_grad:
            continue
        leaves, structure = _nests.flatten(out)
        first = next(i for i, leaf in enumerate(leaves) if leaf.is_floating_point())
        leaves[first] = _Inject.apply(leaves[first], loss * module.loss_scale)
        out = _nests.unflatten(leaves, structure)
    return out
