"""Switch Transformer's gate. T tokens, K = 1 expert per token, E experts, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.gates.functional import check_capacity, expert_capacity, router_logits
from moeops.gates.naive import NaiveGate
from moeops.losses import switch_loss
from moeops.ops.routing import topk_route
from moeops.ops.sorting import limit_capacity

JITTERS = ("input", "logits")


class SwitchGate(NaiveGate):
    """Send each token to one expert, weighted by its probability, as in the Switch Transformer.

    ``p = softmax(W x + b)`` over all experts; the weight is the largest ``p``, so the router learns from it. The loss
    is ``E * sum_e f_e * P_e`` with ``f_e`` the share of tokens whose best expert is ``e`` and ``P_e`` the mean of
    ``p_e``, 1 at perfect balance. Each expert takes its first ``ceil(factor * T / E)`` tokens, the rest get id -1.

    Departures from FastMoE's gate of the same name:

    - The jitter multiplies the router's input by ``U(1 - switch_eps, 1 + switch_eps)``, the paper's "input jitter".
      FastMoE adds that factor to the logits; ``jitter="logits"`` does so too.
    - ``f`` and ``P`` count all tokens, as in the paper; FastMoE counts only those that fit, which hides an overflow
      from the loss that is there to prevent it, and divides by zero when none fits.
    - The capacity counts this rank's tokens, and which tokens overflow is deterministic: the last ones.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        topk: must be 1.
        switch_eps: half-width of the jitter, in training only; 0 turns it off.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        gate_bias: give the router a bias.
        jitter: ``"input"`` or ``"logits"``.

    Raises:
        ValueError: ``topk`` is not 1, or another argument does not fit.
    Source: Switch Transformer, arXiv:2101.03961, section 2.

    Example:
        >>> gate = SwitchGate(8, 4, 1)
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_ids.shape, gate.get_loss().shape
        (torch.Size([5, 1]), torch.Size([]))
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        topk: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] | float | None = (1.2, 2.4),
        gate_bias: bool = True,
        *,
        jitter: str = "input",
    ) -> None:
        name = type(self).__name__
        if topk != 1:
            raise ValueError(f"{name}: topk must be 1, got {topk!r}. Pass top_k=1 to the layer.")
        super().__init__(d_model, num_expert, world_size, topk, gate_bias)
        if not isinstance(switch_eps, (int, float)) or not 0 <= switch_eps < 1:
            raise ValueError(
                f"{name}: switch_eps must be in [0, 1), got {switch_eps!r}. Use 0 for no jitter."
            )
        if jitter not in JITTERS:
            raise ValueError(
                f"{name}: jitter must be one of {JITTERS}, got {jitter!r}. Pick one of them."
            )
        self.switch_eps = float(switch_eps)
        self.capacity = check_capacity(name, capacity)
        self.jitter = jitter

    def _noise(self, like: Tensor) -> Tensor:
        """Uniform noise in ``[1 - switch_eps, 1 + switch_eps]``."""
        return torch.rand_like(like) * (2 * self.switch_eps) + (1 - self.switch_eps)

    def forward(  # type: ignore[override]
        self, inp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose one expert per token: ``inp [T, D]`` to topk_ids ``[T, 1]`` and topk_weights ``[T, 1]``."""
        noisy = self.training and self.switch_eps > 0
        if noisy and self.jitter == "input":
            # In the router's type: bfloat16 would round most of a small jitter away.
            x = inp.to(torch.promote_types(inp.dtype, torch.float32))
            inp = x * self._noise(x)
        logits = router_logits(inp, self.gate)  # [T, E]
        if noisy and self.jitter == "logits":
            logits = logits + self._noise(logits)
        topk_weights, topk_ids = topk_route(logits, 1, renormalize=False)
        self.set_loss(switch_loss(logits, topk_ids))
        if self.capacity is not None:
            factor = self.capacity[0 if self.training else 1]
            rows = expert_capacity(factor, inp.shape[0], 1, self.tot_expert)
            topk_ids = limit_capacity(topk_ids, self.tot_expert, rows)
        return topk_ids, topk_weights

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, switch_eps={self.switch_eps}, capacity={self.capacity}, "
            f"jitter={self.jitter!r}"
        )
