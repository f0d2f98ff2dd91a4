"""Switch Transformer's gate. T tokens, K = 1 expert per token, E experts, D model width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeops.gates._fastmoe_names import accept_fastmoe_names
from moeops.gates._limited import LimitedGate
from moeops.gates.functional import (
    balanced_route,
    check_balance,
    check_capacity,
    check_capacity_options,
    router_logits,
)
from moeops.losses import masked_score_sums
from moeops.losses._common import TINY
from moeops.ops.routing import chosen_weights
from moeops.ops.sorting import count_tokens

JITTERS = ("input", "logits")


class SwitchGate(LimitedGate):
    """Send each token to one expert, weighted by its probability, as in the Switch Transformer.

    ``p = softmax(W x + b)`` over all experts; the weight is the largest ``p``, so the router learns from it. The loss
    is ``E * sum_e f_e * P_e`` with ``f_e`` the share of tokens whose best expert is ``e`` and ``P_e`` the mean of
    ``p_e``, 1 at perfect balance. Each expert takes its first ``ceil(factor * T / E)`` tokens, the rest get id -1 and
    add nothing to the output. ``drop_policy`` names another order than that of the tokens.

    With ``global_capacity`` the experts count the tokens of all ranks that hold experts, earlier ranks first: what
    one rank with all the tokens would do. With ``balance="global"`` ``f_e`` counts the tokens of all ranks of
    ``group``; see ``moeops.losses.balance_loss``.

    Departures from FastMoE's gate of the same name:

    - The jitter multiplies the router's input by ``U(1 - switch_eps, 1 + switch_eps)``, the paper's "input jitter".
      FastMoE adds that factor to the logits; ``jitter="logits"`` does so too.
    - ``f`` and ``P`` count all tokens, as in the paper. FastMoE counts only those that fit, which hides an overflow
      from the loss that is there to prevent it: ``f_e`` is the share of the kept tokens, ``P_e`` the sum of ``p_e``
      over the number of kept ones, and 0 / 0 when none fits. ``compat=True`` does so too, with 0 for 0 / 0.
    - Which tokens overflow is deterministic: the last ones.
    - Across ranks FastMoE's capacity is always the global one.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: must be 1; also as ``topk``, FastMoE's name.
        switch_eps: half-width of the jitter, in training only; 0 turns it off.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        gate_bias: give the router a bias.
        jitter: ``"input"`` or ``"logits"``.
        drop_policy: who stays when an expert overflows: ``"position"``, ``"priority"`` (the largest probabilities)
            or ``"random"``; see ``apply_capacity``.
        global_capacity: one capacity for the tokens of all ``world_size`` ranks; with ``"position"`` only.
        balance: set the loss; ``"global"``: ``f_e`` over all ranks of ``group``; ``False`` for no loss.
        compat: FastMoE's loss.
        group: the other ranks, a process group; a layer may set it later.

    Raises:
        ValueError: ``top_k`` is not 1, another argument does not fit, or ``group`` is missing when it is needed.
    Source: Switch Transformer, arXiv:2101.03961, section 2.

    Example:
        >>> gate = SwitchGate(8, 4, 1)
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_ids.shape, gate.get_loss().shape
        (torch.Size([5, 1]), torch.Size([]))
    """

    @accept_fastmoe_names
    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] | float | None = (1.2, 2.4),
        gate_bias: bool = True,
        *,
        jitter: str = "input",
        drop_policy: str = "position",
        global_capacity: bool = False,
        balance: bool | str = True,
        compat: bool = False,
        group: Any = None,
    ) -> None:
        name = type(self).__name__
        if top_k != 1:
            raise ValueError(f"{name}: top_k must be 1, got {top_k!r}. Pass top_k=1 to the layer.")
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        if not isinstance(switch_eps, (int, float)) or not 0 <= switch_eps < 1:
            raise ValueError(
                f"{name}: switch_eps must be in [0, 1), got {switch_eps!r}. Use 0 for no jitter."
            )
        if jitter not in JITTERS:
            raise ValueError(
                f"{name}: jitter must be one of {JITTERS}, got {jitter!r}. Pick one of them."
            )
        check_capacity_options(
            name, drop_policy, global_capacity, ("position", "priority", "random")
        )
        check_balance(name, balance)
        if compat and balance == "global":
            raise ValueError(
                f"{name}: balance must not be 'global' with compat, got 'global'. FastMoE's loss is local."
            )
        self.switch_eps = float(switch_eps)
        self.capacity = check_capacity(name, capacity)
        self.jitter = jitter
        self.drop_policy = drop_policy
        self.global_capacity = bool(global_capacity)
        self.balance = balance
        self.compat = bool(compat)
        self.group = group

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose one expert per token: ``inp [T, D]`` to topk_ids ``[T, 1]`` and topk_weights ``[T, 1]``."""
        noisy = self.training and self.switch_eps > 0
        jitter = self.switch_eps if noisy and self.jitter == "input" else 0.0
        logits = router_logits(inp, self.gate, jitter=jitter)  # [T, E]
        if noisy and self.jitter == "logits":
            # FastMoE's arithmetic, for its bits.
            logits = logits + (
                torch.rand_like(logits) * 2 * self.switch_eps + 1.0 - self.switch_eps
            )
        group = self._balance_group() if self.balance == "global" else None
        topk_weights, topk_ids, loss = balanced_route(
            logits, 1, balance=bool(self.balance), renormalize=False, group=group, mask=mask
        )
        kept_ids = self._limit(topk_ids, topk_weights, mask)
        if self.compat and self.balance:
            loss = _kept_loss(logits, kept_ids, mask)
        self.set_loss(loss, logits, topk_ids, mask)
        return kept_ids, topk_weights

    def weights_at(self, inp: Tensor, topk_ids: Tensor) -> Tensor:
        """Probabilities ``[T, 1]`` of experts chosen elsewhere, without jitter, see ``moeops.RoutingReplay``."""
        return chosen_weights(router_logits(inp, self.gate), topk_ids, renormalize=False)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, switch_eps={self.switch_eps}, capacity={self.capacity}, "
            f"jitter={self.jitter!r}, drop_policy={self.drop_policy!r}, global_capacity={self.global_capacity}, "
            f"balance={self.balance!r}, compat={self.compat}"
        )


def _kept_loss(logits: Tensor, topk_ids: Tensor, mask: Tensor | None) -> Tensor:
    """FastMoE's loss: both means are taken over the tokens that were kept."""
    counts = count_tokens(topk_ids, logits.shape[1])  # [E]
    kept = counts.sum() + TINY
    return logits.shape[1] * (counts * masked_score_sums(logits, mask)).sum() / kept / kept
