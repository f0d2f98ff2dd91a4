"""Tutel's top-any gate. T tokens, K experts per token, E experts, D model width, C capacity in rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked, hide_masked
from moeops.gates.base import check_top_k
from moeops.gates.functional import MILLION, Count, apply_capacity, balanced_route, router_logits
from moeops.gates.naive import NaiveGate
from moeops.losses import cv_squared, masked_score_sums
from moeops.ops.routing import topk_route

DROP_POLICIES = ("choice", "batch")
BALANCES = ("gshard", "load", False)


class TutelGate(NaiveGate):
    """Choose any number of experts with any capacity, both per call, as Tutel's "top" gate does.

    ``h = W x``, plus ``gate_noise / E * N(0, 1)`` in training; ``p = softmax(h)``; the ``K`` largest are chosen and
    weighted by ``p``, with ``K > 1`` and ``renormalize`` divided by their sum. Weights are not rescaled when
    a pair is dropped.

    **Capacity**, with ``s = ceil(T / E)``, is ``C = K * int(f * s)`` rounded up to a multiple of ``alignment`` for a
    factor ``f > 0``. ``f = 0``, or ``None``, drops nothing. ``f < 0`` drops what ``-f`` drops: Tutel's buffers then
    have ``min(largest load, K * int(-f * s))`` rows, and the largest load drops nothing by itself. So no capacity
    depends on a measured load, nothing is copied to the host or reduced over ranks, and how many rows are computed is
    the dispatcher's matter, which makes no more than there are pairs. First choices come before second ones, in token
    order or, with ``drop_policy="batch"``, in the order of the tokens' largest ``p``.

    **Per call:** ``gate(x, top_k=..., capacity=...)``; or write the attributes ``top_k`` and ``capacity``, which a
    layer's calls then use. A compiled model makes a graph for each pair of values.

    **The loss** is ``E * sum_e f_e * P_e`` of first choices (GShard), or with ``balance="load"`` half the sum of
    the importance loss ``CV2(sum_t softmax(W x)_te)`` and the load loss ``CV2(sum_t P(e is among the best K of t when
    its noise is drawn again))``, with the noise ``N(0, gate_noise / E)`` and the K-th best noisy logit as the mark.

    Departures from Tutel:

    - The load loss compares logits with logits. Tutel subtracts the K-th best noisy *logit* from *probabilities*.
    - Its variance divides by ``E``, not by ``E - 1``, as in ``moeops.losses``: one expert gives 0, not NaN.
    - ``compat=True`` gives Tutel's numbers in both.
    - The router computes in float32 always; ``fp32_gate`` says what its parameters are stored in.
    - Tokens with the same largest ``p`` keep their order under ``drop_policy="batch"``.
    - The names of the arguments: ``capacity`` for Tutel's ``capacity_factor``, ``drop_policy="batch"`` for
      ``batch_prioritized_routing``, ``renormalize`` for ``normalize_gate``, ``balance`` for ``is_gshard_loss``.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        capacity: ``f``, any finite number, or a pair (training, evaluation), or ``None`` for no limit.
        gate_noise: factor of the noise, at least 0; above 0 for the load loss.
        drop_policy: ``"choice"`` or ``"batch"``, see above.
        renormalize: see above.
        balance: the loss: ``"gshard"``, ``"load"``, or ``False``.
        fp32_gate: keep the router's parameters in float32 when the module is cast to a half type.
        alignment: ``C`` is a multiple of it.
        compat: Tutel's load and importance losses.

    Attributes:
        gate: the router, ``RouterLinear(D, E)`` without bias.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: Tutel, arXiv:2206.03382; losses and batch-prioritised routing: V-MoE, arXiv:2106.05974.

    Example:
        >>> gate = TutelGate(8, 4, top_k=2, capacity=None)
        >>> x = torch.randn(5, 8)
        >>> gate(x)[0].shape, gate(x, top_k=3, capacity=1.25)[0].shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        capacity: tuple[float, float] | float | None = 1.0,
        gate_noise: float = 0.0,
        drop_policy: str = "choice",
        renormalize: bool = True,
        balance: bool | str = "gshard",
        fp32_gate: bool = False,
        alignment: int = 1,
        compat: bool = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        name = type(self).__name__
        _read_capacity(name, capacity)
        if drop_policy not in DROP_POLICIES:
            raise ValueError(
                f"{name}: drop_policy must be one of {DROP_POLICIES}, got {drop_policy!r}. Pick one of them."
            )
        if balance not in BALANCES:
            raise ValueError(
                f"{name}: balance must be one of {BALANCES}, got {balance!r}. Pick one of them."
            )
        if not isinstance(gate_noise, (int, float)) or not 0 <= gate_noise < math.inf:
            raise ValueError(
                f"{name}: gate_noise must be at least 0 and finite, got {gate_noise!r}. Use 0 for none."
            )
        if balance == "load" and gate_noise == 0:
            raise ValueError(
                f"{name}: gate_noise must be above 0 with balance='load', got {gate_noise!r}. "
                "The load loss is the probability that noise of this width moves a choice; use 1.0."
            )
        _checks.check_int(name, "alignment", alignment, 1, "Use 1 for none.")
        self.capacity = capacity
        self.gate_noise = float(gate_noise)
        self.drop_policy = drop_policy
        self.renormalize = bool(renormalize)
        self.balance = balance
        self.fp32_gate = bool(fp32_gate)
        self.gate.keep_float32 = self.fp32_gate
        self.alignment = alignment
        self.compat = bool(compat)

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self,
        inp: Tensor,
        *,
        top_k: int | None = None,
        capacity: tuple[float, float] | float | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            inp: tokens, ``[T, D]``, any float type.
            top_k: ``K`` of this call; ``None`` for the attribute.
            capacity: of this call, 0 for no limit; ``None`` for the attribute.
            mask: ``[T]``, tokens that are not there; see ``BaseGate``.

        Returns:
            topk_ids ``[T, K]`` int64 and topk_weights ``[T, K]`` float32 (float64 for float64).

        Raises:
            ValueError: a number or a shape does not fit.  TypeError: a number is not an int.
        """
        top_k = self.top_k if top_k is None else top_k
        name = type(self).__name__
        check_top_k(name, top_k, self.tot_expert)
        factors = _read_capacity(name, self.capacity if capacity is None else capacity)
        factor = factors[0 if self.training else 1]
        clean = router_logits(inp, self.gate)  # [T, E]
        logits = clean
        if self.training and self.gate_noise > 0:
            logits = clean + torch.randn_like(clean) * (self.gate_noise / self.tot_expert)
        renormalize = top_k > 1 and self.renormalize
        if self.balance != "load":
            topk_weights, topk_ids, loss = balanced_route(
                logits,
                top_k,
                balance=bool(self.balance),
                renormalize=renormalize,
                num_counted=1,
                mask=mask,
            )
        else:
            topk_weights, topk_ids = topk_route(logits, top_k, renormalize=renormalize)
            mark = logits.gather(1, topk_ids[:, -1:])
            loss = self._load_importance_loss(clean, mark, mask)
            topk_ids = drop_masked(topk_ids, mask)
        self.set_loss(loss, logits, topk_ids, mask)
        if factor != 0:
            policy, priority = "choice", topk_weights
            if self.drop_policy == "batch":
                largest, _ = topk_route(logits.detach(), 1, renormalize=False)  # [T, 1]
                policy, priority = "batch", largest.expand_as(topk_weights)
            topk_ids = apply_capacity(
                topk_ids,
                priority,
                self.tot_expert,
                lambda tokens: self._capacity(tokens, top_k, abs(factor)),
                policy=policy,
                mask=mask,
            )
        return topk_ids, topk_weights

    def _capacity(self, num_tokens: Count, top_k: int, factor: float) -> Count:
        """``C`` for a factor above 0, in integers on the factor rounded to millionths."""
        share = (num_tokens + self.tot_expert - 1) // self.tot_expert
        rows = share * round(factor * MILLION) // MILLION * top_k
        return (rows + self.alignment - 1) // self.alignment * self.alignment

    def _load_importance_loss(self, clean: Tensor, mark: Tensor, mask: Tensor | None) -> Tensor:
        """Half the sum of importance and load loss; ``mark [T, 1]`` is the K-th best noisy logit."""
        sigma = self.gate_noise / self.tot_expert
        value = torch.softmax(clean, dim=-1) if self.compat else clean
        passing = torch.erfc((mark - value) / (sigma * math.sqrt(2)))  # [T, E]
        load = 0.5 * hide_masked(passing, mask).sum(0)  # [E]
        weights = masked_score_sums(clean, mask)  # [E]
        if self.compat:
            return (_cv_squared_tutel(weights) + _cv_squared_tutel(load)) / 2
        return (cv_squared(weights) + cv_squared(load)) / 2

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, capacity={self.capacity}, gate_noise={self.gate_noise}, "
            f"drop_policy={self.drop_policy!r}, renormalize={self.renormalize}, balance={self.balance!r}, "
            f"fp32_gate={self.fp32_gate}, alignment={self.alignment}, compat={self.compat}"
        )


def _cv_squared_tutel(values: Tensor) -> Tensor:
    """With the sample variance and Tutel's way around a division by 0."""
    mean = values.mean()
    return (values - mean).square().sum() / (values.shape[0] - 1) / (mean.square() + 1e-10)


def _read_capacity(gate: str, capacity: Any) -> tuple[float, float]:
    """Factors (training, evaluation) from a factor, a pair, or ``None``; 0 for no limit."""
    if capacity is None:
        return 0.0, 0.0
    pair = capacity if isinstance(capacity, (tuple, list)) else (capacity, capacity)
    if len(pair) != 2 or not all(isinstance(c, (int, float)) and -1e6 < c < 1e6 for c in pair):
        raise ValueError(
            f"{gate}: capacity must be None, a finite factor, or a pair (training, evaluation) of them, got "
            f"{capacity!r}. 1.0 leaves room for the average load, 0 drops nothing."
        )
    return pair[0], pair[1]
