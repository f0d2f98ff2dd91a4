"""Gates and experts from what users hand to a layer: classes, functions, ready modules."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moeops import _checks
from moeops.gates.base import BaseGate
from moeops.gates.naive import NaiveGate


def placed(device: torch.device | str | None) -> contextlib.AbstractContextManager[Any]:
    """Where modules are built whose constructors need not know of devices."""
    return contextlib.nullcontext() if device is None else torch.device(device)


def build_gate(
    op: str,
    gate: Any,
    d_model: int,
    num_expert: int,
    world_size: int,
    top_k: int,
    gate_bias: bool | None,
) -> nn.Module:
    """Call a gate's class or factory, or take a ready one."""
    if isinstance(gate, nn.Module):
        built = gate
    elif callable(gate):
        _checks.check_int(op, "top_k", top_k, 1, "Choose 1 <= top_k <= num_expert.")
        if top_k > num_expert * world_size:
            raise ValueError(
                f"{op}: top_k must be at most the {num_expert * world_size} experts, got {top_k}. Lower top_k."
            )
        given = gate_bias is not None and _takes_gate_bias(gate)
        options = {"gate_bias": gate_bias} if given else {}
        built = gate(d_model, num_expert, world_size, top_k, **options)
    else:
        built = gate
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"{op}: gate must be a gate class, a function that builds a gate, or an nn.Module, got "
            f"{_checks.describe(built)}. Subclass moeops.gates.BaseGate."
        )
    tot_expert = getattr(built, "tot_expert", num_expert * world_size)
    if tot_expert != num_expert * world_size:
        raise ValueError(
            f"{op}: gate must choose among the layer's {num_expert * world_size} experts, got one for {tot_expert}. "
            "Build it with the same num_expert."
        )
    return built


def set_expert_shards(gate: nn.Module, num_shards: int) -> None:
    """Tell gates, those in wrappers too, how many ranks hold one expert together."""
    for module in gate.modules():
        if isinstance(module, BaseGate):
            module.expert_shards = num_shards


def _takes_gate_bias(gate: Callable[..., Any]) -> bool:
    """The constructor names ``gate_bias``, or hands its keywords on to a NaiveGate."""
    try:
        parameters = inspect.signature(gate).parameters
    except (TypeError, ValueError):  # no signature: a builtin
        return False
    if "gate_bias" in parameters:
        return True
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return open_ended and isinstance(gate, type) and issubclass(gate, NaiveGate)


EXPERT_CALLS = ("rows", "rows,count")


def _positional(expert: nn.Module) -> list[inspect.Parameter]:
    """Positional parameters of an expert's ``forward``, that of the module under ``torch.compile``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    inner = getattr(expert, "_orig_mod", expert)
    parameters = inspect.signature(type(inner).forward).parameters.values()
    return [parameter for parameter in parameters if parameter.kind in kinds][1:]  # without self


def takes_count(expert: nn.Module) -> bool:
    """The expert's ``forward`` asks for two arguments: rows, and how many these are, as FastMoE 1.x calls it."""
    return sum(parameter.default is parameter.empty for parameter in _positional(expert)) == 2


def accepts_count(expert: nn.Module) -> bool:
    """The expert's ``forward`` may be called with two arguments."""
    return len(_positional(expert)) > 1


def build_expert(op: str, expert: Any, d_model: int, may_be_ready: bool) -> nn.Module:
    """Call an expert's class or factory, or take a ready one from a list."""
    if isinstance(expert, nn.Module):
        if may_be_ready:
            return expert
        raise TypeError(
            f"{op}: expert must be a class, a function of d_model or a list, got the ready module "
            f"{type(expert).__name__}. Pass a list with one module per expert."
        )
    built = expert(d_model) if callable(expert) else expert
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"{op}: expert must build an nn.Module, got {_checks.describe(built)}. "
            "Pass a class, or a function of d_model that returns a module."
        )
    return built
