"""What gates with a varying number of experts per token share. T tokens, K slots per token, E experts, R rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moeops import _checks
from moeops.gates.functional import apply_capacity, expert_capacity
from moeops.gates.naive import NaiveGate
from moeops.gates.recording import add_up
from moeops.types import Routing


def check_finite(gate: str, logits: Tensor) -> None:
    """Refuse NaN and infinite logits where ``topk_route`` would: on CPU, on CUDA under its debug switch."""
    if torch.compiler.is_compiling():
        return
    checked = logits.device.type == "cpu" or (
        logits.device.type == "cuda" and _checks.debug_checks()
    )
    if checked and not bool(logits.isfinite().all()):
        raise RuntimeError(
            f"{gate}: logits must be finite, got NaN or infinity. Look for overflow in the router or its input."
        )


class VariableGate(NaiveGate):
    """Base of gates that fill as many of a token's ``K`` slots as it needs, and leave the others empty (id -1).

    **The row budget.** The experts' memory and time follow the number of rows, which must not depend on values, or
    every step would wait for a count from the device. Without a budget there are ``T * K`` rows, as if every slot
    were filled. With ``row_budget = b`` there are ``ceil(b * T)``: room for ``b`` experts per token on average. What
    does not fit is dropped, the slots with the lowest priority first (the gate says which those are; a priority never
    depends on a token's position, ties alone are broken by it), and counted in the buffer ``dropped``: slots lost
    in all forwards since it was last cleared, those of recomputations and exported programs apart.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: see the gate.
        gate_bias: give the router a bias.
        row_budget: ``b``, above 0; ``None`` for no limit.
    """

    dropped: Tensor

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        top_k: int,
        gate_bias: bool,
        row_budget: float | None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        name = type(self).__name__
        if row_budget is not None and not (
            isinstance(row_budget, (int, float)) and 0 < row_budget < math.inf
        ):
            raise ValueError(
                f"{name}: row_budget must be None or above 0 and finite, got {row_budget!r}. "
                "It is the average number of experts per token that there is room for."
            )
        self.row_budget = None if row_budget is None else float(row_budget)
        self.register_buffer("dropped", torch.empty((), dtype=torch.int64), persistent=False)
        VariableGate.reset_parameters(self)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the count of dropped slots to 0; the router resets itself."""
        self.dropped.zero_()

    def _fit(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        priority: Callable[[], Tensor],
        mask: Tensor | None = None,
    ) -> Routing:
        """Drop what the row budget has no room for: the slots with the lowest ``priority() [T, K]``.

        The weights of the empty slots are 0, but for masked tokens, whose ids are -1: they keep theirs.
        """
        num_tokens, num_slots = topk_ids.shape
        num_rows = None
        if self.row_budget is not None and self.row_budget < num_slots:
            budget = self.row_budget
            # A bound: with a mask there is room for the other tokens' share of it.
            num_rows = expert_capacity(budget, num_tokens, 1, 1)
            filled = topk_ids >= 0
            # One queue for all slots that hold something, whatever the expert.
            queue = torch.where(filled, 0, -1)
            queue = apply_capacity(
                queue,
                priority(),
                1,
                lambda tokens: expert_capacity(budget, tokens, 1, 1),
                policy="priority",
                mask=mask,
            )
            add_up(self.dropped, filled.sum() - (queue >= 0).sum())
            topk_ids = torch.where(queue < 0, -1, topk_ids)
            empty = topk_ids < 0 if mask is None else (topk_ids < 0) & (mask == 0)[:, None]
            topk_weights = topk_weights.masked_fill(empty, 0)
        return Routing(topk_ids, topk_weights, num_rows)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return f"{super().extra_repr()}, row_budget={self.row_budget}"
