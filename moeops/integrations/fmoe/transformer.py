"""FastMoE's MLP of a transformer. T tokens, D model width, H hidden width of an expert, R rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeops.dispatch.base import Block
from moeops.integrations.fmoe import layers
from moeops.integrations.fmoe._settings import use_compat
from moeops.integrations.fmoe.fastermoe import dispatch_from_environment
from moeops.integrations.fmoe.gates import NaiveGate
from moeops.integrations.fmoe.linear import FMoELinear
from moeops.layers import transformer

# Positional order of version 1.1, and of 0.2, whose fourth argument is world_size, an int.
_NAMES = ("num_expert", "d_model", "d_hidden", "activation", "expert_dp_comm", "expert_rank")
_NAMES_0_2 = ("num_expert", "d_model", "d_hidden", "world_size", "mp_group", "activation")


class _Expert(nn.Module):
    """MLPs of ``num_expert`` experts: ``htoh4``, an activation, ``h4toh``, both with biases.

    For subclasses of ``FMoE`` that set ``self.experts``, and as one expert of a list. ``FMoETransformerMLP`` has fused
    experts of its own, which are quicker.

    Args:
        num_expert: experts in here.
        d_model: ``D``.
        d_hidden: ``H``.
        activation: module or function on ``[R, H]``.
        rank: kept as an attribute of the projections, without a meaning here.
    """

    def __init__(
        self,
        num_expert: int,
        d_model: int,
        d_hidden: int,
        activation: Callable[[Tensor], Tensor],
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden, bias=True, rank=rank)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model, bias=True, rank=rank)
        self.activation = activation

    def forward(self, inp: Tensor, fwd_expert_count: Tensor) -> Tensor:
        """Rows ``[R, D]`` in expert order, and how many each expert has, to ``[R, D]``."""
        hidden = self.activation(self.htoh4(inp, fwd_expert_count))
        return self.h4toh(hidden, fwd_expert_count)


class FMoETransformerMLP(transformer.FMoETransformerMLP, layers.FMoE):
    """``moeops.FMoETransformerMLP`` with FastMoE's conventions: see ``FMoE`` here.

    ``experts`` is one fused module, whose parameters have moeops' names; it loads state dicts in both of FastMoE's
    layouts.

    Args:
        *args: positional arguments of FastMoE's layer of version 1.1; or of 0.2, up to ``activation``, where the
            fourth is an int.
        compat: FastMoE's numbers, its start (``init="fastmoe"``) among them; ``None`` for what ``install`` was told.
        **kwargs: arguments of FastMoE's layer, and of ``moeops.FMoETransformerMLP``.
    """

    def __init__(self, *args: Any, compat: bool | None = None, **kwargs: Any) -> None:
        op = type(self).__name__
        names = _NAMES_0_2 if len(args) > 3 and type(args[3]) is int else _NAMES
        if len(args) > len(names):
            raise TypeError(
                f"{op}: positional arguments must be {names}, got {len(args)}. Pass the others by name."
            )
        options = dict(zip(names, args, strict=False))
        twice = sorted(options.keys() & kwargs.keys())
        if twice:
            raise TypeError(f"{op}: {twice[0]} must be given once, got it by position and by name.")
        options.update(kwargs)
        options.setdefault("gate", NaiveGate)
        self._compat = use_compat(compat)
        if self._compat:
            options.setdefault("init", "fastmoe")
            options.setdefault("slice_gradients", "fastmoe")
        if "dispatch" not in options and "device_mesh" not in options:
            world_size = options.get("world_size", 1)
            d_model, d_hidden = options.get("d_model", 1024), options.get("d_hidden", 4096)
            options.update(dispatch_from_environment(world_size, d_model, d_hidden))
        super().__init__(**options)

    def expert_fn(self, inp: Tensor, fwd_expert_count: Tensor) -> Tensor:
        """Run this rank's experts on rows in expert order; a subclass may do it otherwise."""
        counts = fwd_expert_count.to(inp.device)
        offsets = nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return self.experts(inp, expert_offsets=offsets)

    def _overrides_expert_fn(self) -> bool:
        return type(self).expert_fn is not FMoETransformerMLP.expert_fn

    def _block(self) -> Block | None:  # type: ignore[override]  # None too
        return None if self._overrides_expert_fn() else super()._block()

    def _run_experts(
        self, rows: Any, expert_offsets: Tensor, rows_per_expert: list[int] | None
    ) -> Any:
        if self._overrides_expert_fn():
            return layers.FMoE._run_experts(self, rows, expert_offsets, rows_per_expert)
        return super()._run_experts(rows, expert_offsets, rows_per_expert)
