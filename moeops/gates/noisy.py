"""Noisy top-k gate. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops._masks import drop_masked
from moeops.gates.functional import (
    RouterLinear,
    apply_capacity,
    balanced_route,
    check_capacity,
    expert_capacity,
    router_logits,
)
from moeops.gates.naive import NaiveGate
from moeops.losses import cv_squared, importance, noisy_load
from moeops.ops.noisy import noisy_topk_route
from moeops.ops.routing import topk_route
from moeops.ops.sorting import count_tokens

BALANCES = ("load", "gshard", False)


class NoisyGate(NaiveGate):
    """Send each token to the ``top_k`` best experts of noisy logits, as in the sparsely-gated mixture of experts.

    ``h = W x + n * sigma`` with ``n ~ N(0, 1)`` and ``sigma = softplus(W_noise x) + min_noise``; without noise in
    evaluation, ``h = W x``. The weights are the softmax over the chosen ``h``. The loss is ``CV2(importance) +
    CV2(load)`` with ``CV2 = var / mean ** 2`` over the experts: ``importance_e`` is the sum of the weights that ``e``
    got, ``load_e = sum_t P(e stays among the best K when its own noise is drawn again)``, which is
    ``Phi(((W x)_e - h') / sigma_e)`` with ``h'`` the K-th largest of the other experts' ``h``. In evaluation, and
    where every expert is chosen, ``load_e`` is the number of tokens of ``e``, which has no gradient.

    The noise is drawn by torch: ``torch.manual_seed`` reproduces it.

    The GShard gate of FSMoE is this one with ``min_noise=0, balance="gshard", capacity=1.2``: the same noise without
    a floor, GShard's loss of the noisy logits, and ``ceil(factor * T * K / E)`` pairs per expert, first choices in
    token order, then second ones. A pair that does not fit gets id -1 and adds nothing to the output.

    Departures from FastMoE's gate of the same name:

    - ids and weights are ``[T, K]``; FastMoE's flat ids work for one expert per token only.
    - Evaluation has a loss; FastMoE divides by a sigma of 0.
    - The variance divides by ``E``, as in the paper's own code, not by ``E - 1``: one expert gives 0, not NaN. With
      ``compat=True`` ``CV2 = var / (mean ** 2 + 1e-10)`` with ``E - 1``, and 0 for one expert.
    - The parameters are ``gate.weight`` and ``noise.weight``, ``[E, D]``; FastMoE's are ``w_gate`` and ``w_noise``,
      their transposes, which ``load_state_dict`` takes too.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        min_noise: the least ``sigma``, at least 0; above 0 with ``balance="load"``, which divides by it.
        balance: the loss: ``"load"`` as above, ``"gshard"`` for ``moeops.losses.gshard_loss``, or ``False``.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        compat: FastMoE's variance.

    Attributes:
        gate: ``W``, ``RouterLinear(D, E)`` without bias.
        noise: ``W_noise``, the same.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: Shazeer et al. 2017, arXiv:1701.06538, sections 2.1 and 4, appendix A; FSMoE, arXiv:2501.10714, section 2.

    Example:
        >>> gate = NoisyGate(8, 4, 1)
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_ids.shape, gate.get_loss().shape
        (torch.Size([5, 2]), torch.Size([]))
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        min_noise: float = 0.01,
        balance: bool | str = "load",
        capacity: tuple[float, float] | float | None = None,
        compat: bool = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        name = type(self).__name__
        if balance not in BALANCES:
            raise ValueError(
                f"{name}: balance must be one of {BALANCES}, got {balance!r}. Pick one of them."
            )
        if not isinstance(min_noise, (int, float)) or not 0 <= min_noise < math.inf:
            raise ValueError(
                f"{name}: min_noise must be at least 0 and finite, got {min_noise!r}. Use 0.01."
            )
        if min_noise == 0 and balance == "load":
            raise ValueError(
                f"{name}: min_noise must be above 0 with balance='load', got 0. The load divides by the noise: use "
                "0.01, or balance='gshard'."
            )
        self.min_noise = float(min_noise)
        self.balance = balance
        self.capacity = check_capacity(name, capacity)
        self.compat = bool(compat)
        self.noise = RouterLinear(d_model, self.tot_expert, bias=False)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load a state dict, one with FastMoE's transposed matrices too."""
        for old, new in (("w_gate", "gate.weight"), ("w_noise", "noise.weight")):
            if prefix + old in state_dict and prefix + new not in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old).t()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
        clean = router_logits(inp, self.gate)  # [T, E]
        if self.training:
            spread, noise = router_logits(inp, self.noise), torch.randn_like(clean)  # [T, E] each
        if self.training and self.balance == "load" and mask is None:
            # One op that keeps the noisy logits to itself: they are computed again for whom they are needed.
            topk_weights, sums, load, loss, topk_ids = noisy_topk_route(
                clean, spread, noise, self.top_k, min_noise=self.min_noise
            )
            loss = self._fastmoe_loss(sums, load) if self.compat else loss
            logits = self._noisy(clean, spread, noise) if self.reads_logits else None
        else:
            logits = self._noisy(clean, spread, noise) if self.training else clean
            loss = None
            if self.balance == "gshard":
                topk_weights, topk_ids, loss = balanced_route(
                    logits, self.top_k, num_counted=1, mask=mask
                )
            else:
                topk_weights, topk_ids = topk_route(logits, self.top_k)
                topk_ids = drop_masked(topk_ids, mask)
            if self.balance == "load":
                sums = importance(topk_weights, topk_ids, self.tot_expert)  # [E]
                if self.training:
                    sigma = F.softplus(spread) + self.min_noise
                    load = noisy_load(clean, logits, sigma, topk_ids, mask=mask)
                else:
                    load = count_tokens(topk_ids, self.tot_expert).to(sums.dtype)  # [E]
                loss = self._loss(sums, load)
        self.set_loss(loss, logits, topk_ids, mask)
        if self.capacity is not None:
            factor = self.capacity[0 if self.training else 1]
            topk_ids = apply_capacity(
                topk_ids,
                topk_weights,
                self.tot_expert,
                lambda tokens: expert_capacity(factor, tokens, self.top_k, self.tot_expert),
                policy="choice",
                mask=mask,
            )
        return topk_ids, topk_weights

    def _noisy(self, clean: Tensor, spread: Tensor, noise: Tensor) -> Tensor:
        """``h``."""
        return clean + noise * (F.softplus(spread) + self.min_noise)

    def _loss(self, sums: Tensor, load: Tensor) -> Tensor:
        """``CV2(importance) + CV2(load)``."""
        if self.compat:
            return self._fastmoe_loss(sums, load)
        return cv_squared(sums) + cv_squared(load)

    def _fastmoe_loss(self, sums: Tensor, load: Tensor) -> Tensor:
        """``CV2(importance) + CV2(load)`` with FastMoE's variance."""
        if self.tot_expert == 1:
            return sums.sum() * 0
        first, second = (v.var() / (v.mean().square() + 1e-10) for v in (sums, load))
        return first + second

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, min_noise={self.min_noise}, balance={self.balance!r}, "
            f"capacity={self.capacity}, compat={self.compat}"
        )
