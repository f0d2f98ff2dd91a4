"""A gate without a choice. T tokens, K slots per token."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked
from moeops.gates.base import BaseGate


class ZeroGate(BaseGate):
    """Send every token to expert 0, ``top_k`` times with weight ``1 / top_k``: the baseline without routing.

    It has no parameters, no loss and no capacity, and knows nothing of ``x`` but its length. ``top_k`` may exceed the
    number of experts.

    Departure from FastMoE's gate of the same name: ids and weights are ``[T, K]``; FastMoE's flat ids work for one
    expert per token only.

    Args:
        d_model: not used; here for the signature that layers call.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts; expert 0 is on the first.
        top_k: ``K``.

    Raises:
        ValueError: a number is below 1.  TypeError: a number is not an int.
    Source: FastMoE, arXiv:2103.13262.

    Example:
        >>> topk_ids, topk_weights = ZeroGate(8, 4, 1, top_k=2)(torch.randn(3, 8))
        >>> topk_ids.tolist(), topk_weights.tolist()
        ([[0, 0], [0, 0], [0, 0]], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    """

    has_logits = False

    def __init__(self, d_model: int, num_expert: int, world_size: int = 1, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        _checks.check_int(type(self).__name__, "top_k", top_k, 1, "Pass the slots per token.")
        self.top_k = top_k

    def forward(self, inp: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose expert 0: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
        shape, device = (inp.shape[0], self.top_k), inp.device
        topk_ids = drop_masked(torch.zeros(shape, dtype=torch.int64, device=device), mask)
        dtype = _checks.accumulate_dtype(inp.dtype)
        return topk_ids, torch.full(shape, 1 / self.top_k, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        """Sizes of the gate."""
        return f"num_expert={self.num_expert}, world_size={self.world_size}, top_k={self.top_k}"
