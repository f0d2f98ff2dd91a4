"""HetuMoE's K top-1 gate. T tokens, K prototypes, E experts, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.gates.functional import (
    apply_capacity,
    check_capacity,
    expert_capacity,
    router_logits,
)
from moeops.gates.naive import NaiveGate
from moeops.losses import mask_route
from moeops.ops.balance import prototype_route


class KTop1Gate(NaiveGate):
    """Choose one expert in each of ``top_k`` prototypes, as in expert prototyping (M6-T) and HetuMoE.

    The ``E`` experts stand in ``K`` equal prototypes; prototype ``k`` holds experts ``k * E / K`` to
    ``(k + 1) * E / K``. In each of them ``p = softmax`` over its own logits, the expert with the largest ``p`` is
    chosen and ``p`` is its weight; the ``K`` weights of a token do not sum to 1. Column ``k`` of ids and weights
    belongs to prototype ``k``. The loss is the sum over the prototypes of ``E / K * sum_e f_e * P_e`` with ``f_e`` the
    share of the tokens that chose ``e`` in its prototype and ``P_e`` the mean of ``p_e``: ``K`` at perfect balance.

    Departures from HetuMoE's gate of the same name:

    - No capacity by default; with ``capacity`` the rows per expert are ``ceil(factor * T * K / E)``, HetuMoE rounds
      ``factor * T / E`` up before it multiplies by ``K``.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, a divisor of ``E``.
        gate_bias: give the router a bias.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.

    Raises:
        ValueError: ``top_k`` does not divide ``E``, or another argument does not fit.
    Source: M6-T, arXiv:2105.15082, section 3.3; HetuMoE, arXiv:2203.14685.

    Example:
        >>> topk_ids, topk_weights = KTop1Gate(8, 6, top_k=2)(torch.randn(5, 8))
        >>> bool((topk_ids[:, 0] < 3).all() and (topk_ids[:, 1] >= 3).all())
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
        capacity: tuple[float, float] | float | None = None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        name = type(self).__name__
        if self.tot_expert % top_k != 0:
            raise ValueError(
                f"{name}: top_k must divide the {self.tot_expert} experts, got {top_k}. Choose a divisor."
            )
        self.capacity = check_capacity(name, capacity)

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose one expert per prototype: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
        logits = router_logits(inp, self.gate)  # [T, E]
        route = prototype_route(logits, self.top_k)
        topk_weights, _, loss, topk_ids, _ = mask_route(route, lambda: self._probs(logits), mask)
        self.set_loss(loss, logits, topk_ids, mask)
        if self.capacity is not None:
            factor = self.capacity[0 if self.training else 1]
            topk_ids = apply_capacity(
                topk_ids,
                topk_weights,
                self.tot_expert,
                lambda tokens: expert_capacity(factor, tokens, self.top_k, self.tot_expert),
                mask=mask,
            )
        return topk_ids, topk_weights

    def _probs(self, logits: Tensor) -> Tensor:
        """The softmaxes of the prototypes, ``[T, E]``."""
        prototypes = logits.unflatten(1, (self.top_k, self.tot_expert // self.top_k))
        return torch.softmax(prototypes, dim=-1).flatten(1)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return f"{super().extra_repr()}, capacity={self.capacity}"
