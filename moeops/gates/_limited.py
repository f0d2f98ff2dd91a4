"""Gates whose experts take a bounded number of pairs. T tokens, K experts per token, E experts."""

from __future__ import annotations

from torch import Tensor

from moeops.gates.functional import Count, apply_capacity, expert_capacity
from moeops.gates.naive import NaiveGate


class LimitedGate(NaiveGate):
    """Base of gates that drop what overflows an expert.

    Attributes:
        capacity: factors in training and in evaluation; ``None`` for no limit.
        drop_policy: who stays, see ``apply_capacity``.
        global_capacity: whether an expert counts the tokens of all ranks; ``group_use`` says so in errors.
    """

    capacity: tuple[float, float] | None
    drop_policy: str
    global_capacity: bool
    group_use = "global_capacity"

    def _limit(self, topk_ids: Tensor, topk_weights: Tensor, mask: Tensor | None) -> Tensor:
        """Drop what does not fit."""
        if self.capacity is None:
            return topk_ids
        factor = self.capacity[0 if self.training else 1]
        return apply_capacity(
            topk_ids,
            topk_weights,
            self.tot_expert,
            lambda tokens: self._rows(factor, tokens),
            policy=self.drop_policy,
            group=self._moe_group(self.group_use) if self.global_capacity else None,
            mask=mask,
        )

    def _rows(self, factor: float, num_tokens: Count) -> Count:
        """Pairs per expert."""
        return expert_capacity(factor, num_tokens, self.top_k, self.tot_expert)
