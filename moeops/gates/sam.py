"""HetuMoE's switch-and-mixture gate. T tokens, K experts per token, E experts in G groups, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked, num_unmasked
from moeops.gates.functional import (
    apply_capacity,
    check_capacity,
    expert_capacity,
    router_logits,
)
from moeops.gates.naive import NaiveGate
from moeops.losses import mask_route, score_balance_loss, score_shares
from moeops.losses._common import TINY
from moeops.ops.balance import topk_route_balance
from moeops.ops.routing import chosen_weights, topk_route
from moeops.ops.scores import alignment_sum


class SAMGate(NaiveGate):
    """Switch to one group of experts and mix ``top_k`` of them, so that a token travels to one place only.

    ``p = softmax(W x + b)`` over all experts, which stand in ``num_groups`` equal groups, one per rank by default. The
    group with the largest sum of ``p`` is chosen, in it the ``top_k`` experts with the largest ``p``; the weights are
    ``p`` itself, not renormalised. The loss is a sum: the balance loss ``E * sum_e f_e * P_e`` over all ``K`` choices
    (``f_e`` the tokens that chose ``e``, divided by ``T``; ``K`` at perfect balance), and ``alignment`` times the
    alignment loss, the mean over the tokens of ``sum over the experts e outside the group of max(0, p_e - p_last)``
    with ``p_last`` the smallest chosen ``p``: it teaches the router to hold a token's best experts in one group.

    Departures from HetuMoE's gate of the same name:

    - A group is ``E / G`` experts wide everywhere. HetuMoE sums groups of ``E / G`` experts, but then picks from, and
      aligns to, the ``G`` experts from ``g * G`` on: the same only where ``G * G = E``.
    - The alignment loss is the mean over the tokens, HetuMoE's is their sum.
    - First choices come before second ones when an expert overflows. HetuMoE places later choices behind the number
      of *last* choices, so that rows can collide.
    - ``compat=True`` gives HetuMoE's groups and sum, where its reads stay within the row: ``G * G <= E``.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, at most the experts of a group.
        gate_bias: give the router a bias.
        num_groups: ``G``, a divisor of ``E``; ``None`` for ``world_size``.
        alignment: factor of the alignment loss, at least 0.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        compat: HetuMoE's numbers.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.

    Raises:
        ValueError: the groups do not divide the experts, a group has fewer than ``top_k``, or another argument does
        not fit.
    Source: Switch and Mixture, arXiv:2110.07431; HetuMoE, arXiv:2203.14685.

    Example:
        >>> topk_ids, topk_weights = SAMGate(8, 6, top_k=2, num_groups=2)(torch.randn(5, 8))
        >>> torch.equal(topk_ids[:, 0] // 3, topk_ids[:, 1] // 3)
        True
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
        *,
        num_groups: int | None = None,
        alignment: float = 1.0,
        capacity: tuple[float, float] | float | None = None,
        compat: bool = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        name = type(self).__name__
        groups = world_size if num_groups is None else num_groups
        _checks.check_int(name, "num_groups", groups, 1, "Use None for one group per rank.")
        if self.tot_expert % groups != 0:
            raise ValueError(
                f"{name}: num_groups must divide the {self.tot_expert} experts, got {groups}. Choose a divisor."
            )
        if not isinstance(alignment, (int, float)) or not 0 <= alignment < float("inf"):
            raise ValueError(
                f"{name}: alignment must be at least 0 and finite, got {alignment!r}. Use 0 for no alignment loss."
            )
        if compat and groups * groups > self.tot_expert:
            raise ValueError(
                f"{name}: num_groups must be at most the square root of the {self.tot_expert} experts with compat, "
                f"got {groups}. HetuMoE reads past the last expert there; use compat=False."
            )
        width = groups if compat else self.tot_expert // groups
        if top_k > width:
            raise ValueError(
                f"{name}: top_k must be at most the {width} experts of a group, got {top_k}. "
                "Lower top_k or num_groups."
            )
        self.num_groups = groups
        self.alignment = float(alignment)
        self.capacity = check_capacity(name, capacity)
        self.compat = bool(compat)
        self._width = width

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts of one group: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
        num_experts = self.tot_expert
        logits = router_logits(inp, self.gate)  # [T, E]
        if self.compat:
            topk_ids = self._choose_as_hetumoe(logits)
            topk_weights = chosen_weights(logits, topk_ids, renormalize=False)
            topk_ids = drop_masked(topk_ids, mask)
            balance = score_balance_loss(logits, topk_ids, mask=mask)
        else:
            route = topk_route_balance(
                logits,
                self.top_k,
                renormalize=False,
                num_groups=self.num_groups,
                top_groups=1,
                group_score="sum",
            )
            route = mask_route(route, lambda: score_shares(logits), mask)
            topk_weights, _, balance, topk_ids, _ = route
        # Its f_e is divided by T, not by T * K.
        loss = self.top_k * balance
        if self.alignment > 0:
            aligned = alignment_sum(logits, topk_ids, self._width)
            tokens = 1 if self.compat else num_unmasked(inp, mask, aligned.dtype) + TINY
            loss = loss + aligned * self.alignment / tokens
        self.set_loss(loss, logits, topk_ids, mask)
        if self.capacity is not None:
            factor = self.capacity[0 if self.training else 1]
            topk_ids = apply_capacity(
                topk_ids,
                topk_weights,
                num_experts,
                lambda tokens: expert_capacity(factor, tokens, self.top_k, num_experts),
                policy="choice",
                mask=mask,
            )
        return topk_ids, topk_weights

    def _choose_as_hetumoe(self, logits: Tensor) -> Tensor:
        """Group ``g`` with the largest sum of ``E / G`` probabilities; the best of ``G`` experts from ``g * G`` on."""
        # One bad logit makes its whole row of log_probs bad, whichever group topk_route gets to see and to refuse.
        log_probs = torch.log_softmax(logits.detach(), dim=-1)
        groups = log_probs.exp().view(
            logits.shape[0], self.num_groups, self.tot_expert // self.num_groups
        )
        first = groups.sum(-1).argmax(-1, keepdim=True) * self._width  # [T, 1]
        members = first + torch.arange(self._width, device=first.device)  # [T, width]
        return first + topk_route(log_probs.gather(1, members), self.top_k)[1]

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, num_groups={self.num_groups}, alignment={self.alignment}, "
            f"capacity={self.capacity}, compat={self.compat}"
        )
