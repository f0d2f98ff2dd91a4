"""Gate in which experts choose tokens. T tokens, K experts per token on average, E experts, C tokens per expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeops.gates._variable_k import check_finite
from moeops.gates.functional import (
    Count,
    apply_capacity,
    check_capacity,
    expert_capacity,
    router_logits,
)
from moeops.gates.naive import NaiveGate
from moeops.types import Routing


class ExpertChoiceGate(NaiveGate):
    """Let each expert take its best tokens, instead of each token its best experts.

    ``p = softmax(W x)`` over all experts, ``[T, E]``. Every expert takes the ``C`` tokens with its largest
    ``p_e``, ``C = ceil(capacity * T * top_k / E)``, at most ``T``, weighted by ``p_e``; ties go to the earlier token.
    The load is perfectly balanced by construction, so there is no loss; a token gets ``top_k`` experts on average,
    and between none (its output is zero) and all of them. The paper's capacity factor is ``capacity * top_k``.

    **Not causal.** Whether an expert takes a token depends on all other tokens of the batch, later ones included: a
    language model trained with this gate has seen a trace of what it predicts, and generates token by token with
    other decisions than it was trained with. For encoders and whole inputs it is fine.

    Ids and weights are ``[T, E]``, one slot per expert, -1 where it did not take the token; the record says that
    ``E * C`` slots hold something, and the experts work on exactly that many rows. Choosing costs a sort of ``T * E``
    numbers.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, experts per token on average at a capacity of 1.
        capacity: capacity factors (training, evaluation), or one for both.

    Attributes:
        gate: the router, ``RouterLinear(D, E)`` without bias.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: Zhou et al. 2022, arXiv:2202.09368, section 3.2.

    Example:
        >>> topk_ids, topk_weights, num_rows, _ = ExpertChoiceGate(8, 4, top_k=2)(torch.randn(6, 8))
        >>> (topk_ids >= 0).sum(0).tolist(), num_rows
        ([3, 3, 3, 3], 12)
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        capacity: tuple[float, float] | float = 1.0,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        name = type(self).__name__
        pair = check_capacity(name, capacity)
        if pair is None:
            raise ValueError(
                f"{name}: capacity must be a factor or a pair of factors, got None. 1.0 means top_k experts per token."
            )
        # A larger one leaves no more to take: C is T then. Rounded down to what expert_capacity computes with.
        most = math.floor(1e6 * self.tot_expert / self.top_k) / 1e6
        self.capacity = (min(pair[0], most), min(pair[1], most))

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> Routing:
        """Choose tokens: ``inp [T, D]`` to a Routing of ``[T, E]`` ids and weights."""
        logits = router_logits(inp, self.gate)  # [T, E]
        check_finite(type(self).__name__, logits)
        probs = torch.softmax(logits, dim=-1)  # [T, E]
        every = torch.arange(self.tot_expert, device=probs.device).expand(probs.shape)
        topk_ids = apply_capacity(
            every, probs, self.tot_expert, self._rows, policy="priority", mask=mask
        )
        self.set_loss(None, logits, topk_ids, mask)
        # A masked token weighs as if it had all its slots.
        empty = topk_ids < 0 if mask is None else (topk_ids < 0) & (mask == 0)[:, None]
        topk_weights = probs.masked_fill(empty, 0)
        return Routing(topk_ids, topk_weights, self.tot_expert * self._rows(inp.shape[0]))

    def _rows(self, num_tokens: Count) -> Count:
        """``C``."""
        factor = self.capacity[0 if self.training else 1]
        return expert_capacity(factor, num_tokens, self.top_k, self.tot_expert)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return f"{super().extra_repr()}, capacity={self.capacity}"
