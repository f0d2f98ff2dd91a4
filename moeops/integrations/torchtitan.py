"""moeops' experts in torchtitan, by its own overrides.

.. code-block:: console

    torchtitan ... --override.imports moeops.integrations.torchtitan.grouped_experts

``grouped_experts`` replaces the products on rows, with any token dispatcher. ``routed_experts`` replaces dispatch,
experts and combine by one op, where experts are not spread over ranks. Parameters, their names and checkpoints stay.

T tokens, K experts per token, R rows, E experts, D width, F hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moeops.ops import grouped_linear, moe_mlp, sort_tokens

try:
    from torchtitan.config import derive, override
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
except ImportError as error:
    raise ImportError(
        "moeops.integrations.torchtitan: torchtitan 0.3 or newer must be importable, with its overrides, got "
        f"{error}. Install it with pip install torchtitan."
    ) from error

__all__ = ["grouped_experts", "routed_experts"]


class MoeopsGroupedExperts(GroupedExperts):
    """The three products of SwiGLU experts on rows, by grouped_linear, without a forced cast to bfloat16."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """That of torchtitan's class."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """Rows in expert order to rows; those past the last expert's are zero."""
        w_gate, w_up, w_down = local_weights(self)
        dtype = narrower(x_RD, w_gate)
        x, w_gate, w_up, w_down = (t.to(dtype) for t in (x_RD, w_gate, w_up, w_down))
        ends = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        offsets = F.pad(ends, (1, 0))  # [E + 1]
        hidden = F.silu(grouped_linear(x, w_gate, offsets)) * grouped_linear(x, w_up, offsets)
        return grouped_linear(hidden, w_down, offsets).type_as(x_RD)


class MoeopsRoutedExperts(RoutedExperts):
    """Dispatch, SwiGLU experts and combine of one rank as ``moe_mlp``."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        """That of torchtitan's class."""

    def forward(
        self,
        x_BLD: Tensor,
        topk_scores_BLK: Tensor,
        topk_expert_ids_BLK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        """Tokens to tokens; the counts are not needed."""
        x = x_BLD.flatten(0, 1)  # [T, D]
        w_gate, w_up, w_down = local_weights(self.inner_experts)
        dtype = narrower(x, w_gate)
        plan = sort_tokens(topk_expert_ids_BLK.flatten(0, 1), w_gate.shape[0])
        y = moe_mlp(
            x.to(dtype),
            plan,
            topk_scores_BLK.flatten(0, 1),
            torch.cat((w_gate, w_up), dim=1).to(dtype),  # [E, 2F, D], a copy in every step
            w_down.to(dtype),
        )
        return y.type_as(x).view_as(x_BLD)


@override(
    target=GroupedExperts.Config,
    exact=True,
    description="Experts' products by moeops.grouped_linear.",
)
def grouped_experts(cfg: GroupedExperts.Config) -> GroupedExperts.Config:
    """Use moeops for the products of SwiGLU experts, with any dispatcher. Excludes MXFP8, which replaces the same."""
    return derive(cfg, MoeopsGroupedExperts.Config)


@override(
    target=RoutedExperts.Config,
    exact=True,
    description="Dispatch, experts and combine by moeops.moe_mlp.",
)
def routed_experts(cfg: RoutedExperts.Config) -> RoutedExperts.Config:
    """Use one op for dispatch, SwiGLU experts and combine.

    Raises:
        ValueError: the tokens go to other ranks, or the experts are no plain SwiGLU ones.
    """
    dispatcher, experts = type(cfg.token_dispatcher), type(cfg.inner_experts)
    if dispatcher is not LocalTokenDispatcher.Config:
        raise ValueError(
            "routed_experts: token_dispatcher must be LocalTokenDispatcher, got "
            f"{dispatcher.__qualname__}. Use moeops.integrations.torchtitan.grouped_experts with expert parallelism."
        )
    if experts is not GroupedExperts.Config:
        raise ValueError(
            f"routed_experts: inner_experts must be GroupedExperts, got {experts.__qualname__}. Leave other overrides "
            "of experts out, or use this one for layers without them."
        )
    return derive(cfg, MoeopsRoutedExperts.Config)


def local_weights(experts: GroupedExperts) -> list[Tensor]:
    """Gate, up ``[E, F, D]`` and down ``[E, D, F]`` as they lie on this rank."""
    weights = (experts.w1_EFD, experts.w3_EFD, experts.w2_EDF)
    return [w.to_local() if isinstance(w, DTensor) else w for w in weights]


def narrower(x: Tensor, weight: Tensor) -> torch.dtype:
    """The smaller type of the two: float32 master weights are cast for bfloat16 tokens, and the other way round."""
    return min(x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
