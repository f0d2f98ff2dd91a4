"""What the routers of a model said: logits [T, E] of every gate. T tokens, E experts."""

from __future__ import annotations

from torch import Tensor, nn

from moeops import _checks
from moeops.gates.base import BaseGate
from moeops.layers.walk import clean_name


def keep_logits(model: nn.Module, keep: bool = True) -> None:
    """Let every gate of a model keep the logits of its newest forward, for ``take_logits``.

    Gates without logits (``HashGate``, ``ZeroGate``, ``SoftMoEGate``, ``ForcedBalanceGate`` itself) are left out.
    A compiled model makes a graph with the logits among its outputs, and one without.

    Args:
        model: any module; every ``BaseGate`` in ``model.modules()`` takes part.
        keep: False to stop; what is there is forgotten.

    Raises:
        ValueError: no gate of the model has logits.  TypeError: ``model`` is not a module.
    """
    gates = _gates("keep_logits", model)
    if not gates:
        raise ValueError(
            f"keep_logits: model must hold a gate with logits, got {type(model).__name__} without one. Pass the model "
            "that holds the layers."
        )
    for gate in gates.values():
        gate.keep_logits = bool(keep)
        gate.get_logits()


def take_logits(model: nn.Module, clear: bool = True) -> dict[str, Tensor]:
    """Hand over the logits that the gates of a model have kept and that were not fetched yet.

    For losses of one's own over several layers, for distillation, or to look at. Inside a compiled function they are
    part of the graph; an exported program keeps none, a recomputation by activation checkpointing keeps no second ones.

    Args:
        model: a module for which ``keep_logits`` was called.
        clear: forget the logits, so that their graph can be freed.

    Returns:
        ``[T, E]`` by the gate's name in the model, in the order of ``model.modules()``: what the gate chooses from,
        noise included, float32 (float64 for float64 tokens), with gradients to router and tokens. Rows of masked tokens
        are there too. Gates that did not run are left out; one that ran several times has its newest.

    Raises:
        TypeError: ``model`` is not a module.
    Host sync: none.

    Example:
        >>> import torch
        >>> from moeops import FMoETransformerMLP
        >>> model = nn.Sequential(FMoETransformerMLP(4, 8, 16), FMoETransformerMLP(4, 8, 16))
        >>> keep_logits(model)
        >>> _ = model(torch.randn(5, 8))
        >>> {name: list(logits.shape) for name, logits in take_logits(model).items()}
        {'0.gate': [5, 4], '1.gate': [5, 4]}
    """
    taken = {}
    for name, gate in _gates("take_logits", model).items():
        logits = gate.get_logits(clear)
        if logits is not None:
            taken[name] = logits
    return taken


def _gates(op: str, model: nn.Module) -> dict[str, BaseGate]:
    """The gates that have logits, by name without what torch's wrappers put into it."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {_checks.describe(model)}. Pass the module that holds the "
            "gates."
        )
    return {
        clean_name(raw): module
        for raw, module in model.named_modules()
        if isinstance(module, BaseGate) and module.has_logits
    }
