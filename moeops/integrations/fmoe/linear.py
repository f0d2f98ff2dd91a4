"""FastMoE's linear layer of experts. R rows, E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeops.integrations.fmoe._settings import use_compat
from moeops.integrations.fmoe.functions import MOELinear
from moeops.layers import linear

__all__ = ["FMoELinear", "MOELinear"]


class FMoELinear(linear.FMoELinear):
    """``moeops.FMoELinear`` that casts its input to the type of its weights, as FastMoE's does.

    Args:
        num_expert, in_feat, out_feat, bias, rank: as for ``moeops.FMoELinear``.
        compat: start as FastMoE's, ``init="fastmoe"``; ``None`` for what ``install`` was told.
        **options: of ``moeops.FMoELinear``.
    """

    def __init__(
        self,
        num_expert: int,
        in_feat: int,
        out_feat: int,
        bias: bool = True,
        rank: int = 0,
        *,
        compat: bool | None = None,
        **options: Any,
    ) -> None:
        if use_compat(compat):
            options.setdefault("init", "fastmoe")
        super().__init__(num_expert, in_feat, out_feat, bias, rank, **options)

    def forward(self, inp: Tensor, fwd_expert_count: Tensor) -> Tensor:
        """Apply each expert to its rows, see ``moeops.FMoELinear``."""
        if not torch.is_autocast_enabled(inp.device.type):
            inp = inp.to(self.weight.dtype)
        return super().forward(inp, fwd_expert_count)
