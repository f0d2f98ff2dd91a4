"""EvoMoE's dense-to-sparse gate. T tokens, up to K experts per token, E experts, D model width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import num_unmasked
from moeops.gates.functional import router_logits
from moeops.gates.naive import NaiveGate
from moeops.losses import mask_route
from moeops.losses._common import TINY
from moeops.ops.balance import topk_route_balance


class DenseToSparseGate(NaiveGate):
    """Start with many experts per token and end with few, as the temperature of a Gumbel-softmax falls.

    ``p = softmax((W x + g) / temperature)`` over all experts with Gumbel noise ``g`` in training, without noise in
    evaluation. A token uses the experts with ``p >= threshold``, at least one and at most ``top_k``, the best first;
    the weights are ``p`` itself, not renormalised. A high temperature makes ``p`` flat and every expert is used, a low
    one leaves a single expert: a dense model turns sparse while it trains, and every weight has a gradient to every
    logit all along. The slots of a token that hold no expert have id -1 and weight 0, so the number of experts varies
    per token.

    **The temperature** is a 0-dimensional float32 buffer, saved in ``state_dict`` and kept in float32 when the module
    is cast. ``set_temperature`` writes into it and ``anneal`` follows a schedule: neither recompiles a compiled model.

    Departures from EvoMoE's code:

    - The best expert is used even where its ``p`` is below the threshold, which happens with many experts
      (``E > 1 / threshold``); EvoMoE's token would get nothing.
    - Evaluation has the threshold and the temperature of training without the noise. EvoMoE evaluates the best expert
      alone: build the gate with ``eval_top_k=1`` for that.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, the most experts per token, ``E`` to start fully dense.
        temperature: where it starts, above 0.
        final_temperature: where ``anneal`` ends, above 0.
        threshold: smallest weight that counts, in ``[0, 1)``. No token can have more than ``1 / threshold`` experts:
            fewer than ``top_k`` slots are made where that is less.
        eval_top_k: ``K`` in evaluation; ``None`` for ``top_k``.
        balance: set the loss ``E * sum_e P_e ** 2`` with ``P_e`` the mean of ``p_e`` over the tokens, 1 at perfect
            balance, ``E`` if all go to one expert.

    Attributes:
        gate: the router, ``RouterLinear(D, E)`` without bias.
        temperature: the buffer.

    Raises:
        ValueError: a number does not fit.  TypeError: ``top_k`` is not an int.
    Source: EvoMoE, arXiv:2112.14397; Gumbel-softmax: arXiv:1611.01144.

    Example:
        >>> gate = DenseToSparseGate(8, 4, top_k=4, temperature=10.0, final_temperature=0.1)
        >>> x = torch.randn(5, 8)
        >>> dense = int((gate(x)[0] >= 0).sum())
        >>> gate.anneal(1.0)
        >>> dense, int((gate(x)[0] >= 0).sum()) < 20
        (20, True)
    """

    temperature: Tensor
    float32_buffers = ("temperature",)

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        temperature: float = 2.0,
        final_temperature: float = 0.3,
        threshold: float = 0.02,
        eval_top_k: int | None = None,
        balance: bool = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        name = type(self).__name__
        _check_temperature(name, "temperature", temperature)
        _check_temperature(name, "final_temperature", final_temperature)
        if not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise ValueError(
                f"{name}: threshold must be in [0, 1), got {threshold!r}. Use 0 to keep all top_k experts."
            )
        if eval_top_k is not None:
            _checks.check_int(name, "eval_top_k", eval_top_k, 1, "Use None for top_k.")
            if eval_top_k > top_k:
                raise ValueError(
                    f"{name}: eval_top_k must be at most top_k = {top_k}, got {eval_top_k}. Lower it."
                )
        self.start_temperature = float(temperature)
        self.final_temperature = float(final_temperature)
        self.threshold = float(threshold)
        self.eval_top_k = eval_top_k
        self.balance = bool(balance)
        self.register_buffer("temperature", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the temperature of the start; the router resets itself."""
        self.set_temperature(self.start_temperature)

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: ``inp [T, D]`` to topk_ids and topk_weights, ``[T, K']`` with ``K' <= K`` slots each."""
        logits = router_logits(inp, self.gate)  # [T, E]
        noisy = add_gumbel(logits) if self.training else logits
        route = topk_route_balance(
            noisy,
            self._num_slots(),
            renormalize=False,
            min_score=self.threshold,
            temperature=self.temperature,
        )
        topk_weights, prob_sums, _, topk_ids, _ = mask_route(
            route, lambda: torch.softmax(noisy / self.temperature, dim=-1), mask
        )
        loss = None
        if self.balance:
            means = prob_sums / (num_unmasked(inp, mask, prob_sums.dtype) + TINY)  # [E]
            loss = self.tot_expert * means.square().sum()
        self.set_loss(loss, logits, topk_ids, mask)
        return topk_ids, topk_weights

    def _num_slots(self) -> int:
        """The most experts that can reach the threshold, ``K`` at most."""
        top_k = self.top_k
        if not self.training and self.eval_top_k is not None:
            top_k = self.eval_top_k
        if self.threshold == 0:
            return top_k
        # One too many where 1 / threshold is a whole number, and never too few, rounding included.
        return max(1, min(top_k, math.ceil(1 / self.threshold)))

    @torch.no_grad()
    def set_temperature(self, temperature: float) -> None:
        """Write the temperature: on the device, without a recompilation.

        Args:
            temperature: above 0 and finite.

        Raises:
            ValueError: it is not.
        """
        _check_temperature(f"{type(self).__name__}.set_temperature", "temperature", temperature)
        self.temperature.fill_(float(temperature))

    def anneal(self, progress: float) -> None:
        """Set the temperature of a schedule: ``start * (final / start) ** progress``, the same factor per step.

        Args:
            progress: the part of the schedule that is over, in ``[0, 1]``: ``step / steps``.

        Raises:
            ValueError: ``progress`` is out of range.
        """
        if not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
            raise ValueError(
                f"{type(self).__name__}.anneal: progress must be in [0, 1], got {progress!r}. Pass step / steps."
            )
        start = self.start_temperature
        self.set_temperature(start * (self.final_temperature / start) ** progress)

    def after_step(self, progress: float) -> None:
        """Follow the schedule; see ``anneal``."""
        self.anneal(progress)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, start_temperature={self.start_temperature}, "
            f"final_temperature={self.final_temperature}, threshold={self.threshold}, "
            f"eval_top_k={self.eval_top_k}, balance={self.balance}"
        )


def add_gumbel(logits: Tensor) -> Tensor:
    """Add standard Gumbel noise: the ``argmax`` of the result is a sample of ``softmax(logits)``."""
    draws = torch.empty_like(logits).exponential_()
    if torch.compiler.is_compiling():
        # Eager mode never draws 0 or infinity, Inductor's version of it may.
        draws = draws.clamp(2.0**-25, 64)
    return logits - draws.log_()


def _check_temperature(op: str, name: str, value: object) -> None:
    """``value`` is a finite number above 0."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(
            f"{op}: {name} must be above 0 and finite, got {value!r}. Use 1.0 for plain softmax."
        )
