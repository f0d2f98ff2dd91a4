"""Gate with a ReLU for a router. T tokens, K experts per token on average, E experts, D model width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moeops.gates._variable import VariableGate, check_finite
from moeops.gates.base import exporting
from moeops.gates.functional import router_logits
from moeops.losses import TINY
from moeops.ops import _checks
from moeops.types import Routing

# No sparsity that can be reached needs a coefficient outside; 0 and infinity would be final.
_RANGE = (1e-20, 1e20)


class ReMoEGate(VariableGate):
    """Weigh every expert by ``relu(W x)`` and leave out those with weight 0, as in ReMoE.

    ``r = relu(W x)``, ``[T, E]``; expert ``e`` works on the tokens with ``r_e > 0``. There is no top-k: the
    router is differentiable everywhere but at 0, and a token gets as many experts as it has positive logits. An L1
    loss makes that ``top_k`` on average; the paper's load balancing is part of it:

        loss = coefficient * mean_t sum_e f_e * r_te         f_e = E / K * share of tokens with r_e > 0

    with ``f_e = 1`` without ``balance``. Add it to the task's loss as it is, with factor 1: its strength is the
    buffer ``coefficient``, which ``update_coefficient`` raises when tokens got more than ``K`` experts since the last
    call, and lowers when they got fewer, between 1e-20 and 1e20. Call it once per optimizer step, after the backward.
    Training forwards count in the buffers ``active`` and ``tokens``, on the device and without a graph break;
    recomputations by activation checkpointing and exported programs do not count. A new gate is dense: half of its
    logits are positive, and it takes some hundred steps to become sparse.

    **Several layers.** The paper has one coefficient for all of them, so that each finds its own sparsity and only
    the average is ``K``: ``update_coefficients(model)`` instead of ``gate.update_coefficient()`` for each.

    **Several ranks** with replicas of this gate: sum the counts over them first, as for ``DeepSeekV3Gate``::

        for counts in (gate.active, gate.tokens):
            torch.distributed.all_reduce(counts)
        gate.update_coefficient()

    Ids and weights are ``[T, max_k]``. With ``max_k = E`` (the default) nothing is cut off and the slots are the
    experts; below that a token's ``max_k`` largest weights count, best first. Rows for ``E`` experts per token are
    many: set ``row_budget`` to what training has settled on (``K`` and a margin) when it has. What overflows are the
    slots with the lowest weights of all tokens, counted in ``dropped`` (see ``VariableGate``).

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, experts per token on average that the loss aims at.
        balance: weigh the experts' L1 norms by their loads.
        router_bias: give the router a bias, which the paper does not. Without one, half of the logits stay positive
            whatever ``W`` is as long as ``x`` is symmetric around 0; what trained transformers feed to an MLP is not.
        coefficient: first value of the loss's strength, above 0.
        max_k: most experts a token can get; ``None`` for ``E``.
        row_budget: experts per token that there are rows for on average; ``None`` for ``max_k``.

    Attributes:
        gate: the router, ``nn.Linear(D, E)``.
        coefficient: scalar float32; saved.
        active: scalar int64, positive weights since the last update; saved.
        tokens: scalar int64, tokens since then; saved.
        dropped: slots lost to the row budget, int64; not saved.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: ReMoE, arXiv:2412.14711, section 3.

    Example:
        >>> gate = ReMoEGate(8, 4, top_k=1)
        >>> topk_ids, topk_weights, _, _ = gate(torch.randn(64, 8))
        >>> torch.equal(topk_ids >= 0, topk_weights > 0), int(gate.tokens)
        (True, 64)
        >>> gate.update_coefficient()  # about 2 experts per token: more than 1
        >>> f"{float(gate.coefficient):.1e}"
        '1.2e-08'
    """

    coefficient: Tensor
    active: Tensor
    tokens: Tensor

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        balance: bool = True,
        router_bias: bool = False,
        coefficient: float = 1e-8,
        max_k: int | None = None,
        row_budget: float | None = None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, router_bias, row_budget)
        name = type(self).__name__
        max_k = self.tot_expert if max_k is None else max_k
        _checks.check_int(name, "max_k", max_k, self.top_k, "It is at least top_k, the average.")
        if max_k > self.tot_expert:
            raise ValueError(
                f"{name}: max_k must be at most the {self.tot_expert} experts, got {max_k}. Use None for all."
            )
        if not isinstance(coefficient, (int, float)) or not 0 < coefficient < math.inf:
            raise ValueError(
                f"{name}: coefficient must be above 0 and finite, got {coefficient!r}. Use 1e-8."
            )
        self.balance = bool(balance)
        self.max_k = max_k
        self.register_buffer("coefficient", torch.tensor(float(coefficient), dtype=torch.float32))
        self.register_buffer("active", torch.zeros((), dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    def forward(  # type: ignore[override]
        self, inp: Tensor
    ) -> Routing:
        """Weigh experts: ``inp [T, D]`` to a Routing of ``[T, max_k]`` ids and weights."""
        logits = router_logits(inp, self.gate)  # [T, E]
        check_finite(type(self).__name__, logits)
        weights = torch.relu(logits)  # [T, E]
        positive = weights > 0
        counts = positive.sum(0)  # [E]
        if self.training and self._records():
            self.active.add_(counts.sum())
            self.tokens.add_(torch.ones_like(positive[:, 0], dtype=torch.int64).sum())
        topk_ids = torch.where(positive, torch.arange(self.tot_expert, device=weights.device), -1)
        if not exporting():
            self.set_loss(self._loss(weights, counts), logits, topk_ids)
        if self.max_k < self.tot_expert:
            best = torch.sort(weights.detach(), dim=-1, descending=True, stable=True)
            topk_ids = best.indices[:, : self.max_k]
            weights = weights.gather(1, topk_ids)
            topk_ids = torch.where(weights > 0, topk_ids, -1)
        return self._fit(topk_ids, weights, weights, masked=True)

    def _loss(self, weights: Tensor, counts: Tensor) -> Tensor:
        num_tokens = weights.shape[0] + TINY
        norms = weights.sum(0) / num_tokens  # [E]
        if self.balance:
            norms = norms * counts * (self.tot_expert / self.top_k) / num_tokens
        # A copy: update_coefficient may come between forward and backward, which reads it.
        return self.coefficient.to(weights.dtype, copy=True) * norms.sum()

    def update_coefficient(self, rate: float = 1.2) -> None:
        """Multiply the coefficient by ``rate`` if tokens got more than ``K`` experts, divide if fewer; clear counts.

        In place, without a host copy, one graph under ``torch.compile``. Without counts nothing moves. With several
        ranks sum ``active`` and ``tokens`` over them first.

        Args:
            rate: at least 1; the paper's is 1.2.

        Raises:
            ValueError: ``rate`` is below 1 or not finite.
        """
        _update([self], rate)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.coefficient
        out = super()._apply(fn, recurse)
        after = self.coefficient
        if after.dtype != torch.float32:
            # The value of before: a trip through float16 would make 1e-8 zero.
            source = after if before.is_meta else before
            self.coefficient = source.to(after.device, torch.float32)
        return out

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return f"{super().extra_repr()}, balance={self.balance}, max_k={self.max_k}"


def update_coefficients(model: nn.Module, rate: float = 1.2) -> None:
    """Update the coefficients of all ReMoE gates of a model alike, by the sparsity of all of them, as the paper does.

    As ``ReMoEGate.update_coefficient`` with the counts of all gates added up; coefficients that start equal stay so.

    Args:
        model: any module; every ``ReMoEGate`` in ``model.modules()`` takes part.
        rate: at least 1; the paper's is 1.2.

    Raises:
        ValueError: ``rate`` is below 1 or not finite, or the model has no such gate.

    Example:
        >>> model = nn.ModuleList(ReMoEGate(8, 4, top_k=4) for _ in range(2))
        >>> _ = [gate(torch.randn(64, 8)) for gate in model]
        >>> update_coefficients(model)  # nobody gets 4 of 4 experts for all tokens
        >>> [f"{float(gate.coefficient):.1e}" for gate in model]
        ['8.3e-09', '8.3e-09']
    """
    gates = [module for module in model.modules() if isinstance(module, ReMoEGate)]
    if not gates:
        raise ValueError(
            f"update_coefficients: model must hold a ReMoEGate, got {type(model).__name__} without one. "
            "Pass the model that was built with ReMoE gates."
        )
    _update(gates, rate)


@torch.no_grad()
def _update(gates: Iterable[ReMoEGate], rate: float) -> None:
    if not torch.compiler.is_compiling() and not 1 <= rate < math.inf:
        raise ValueError(
            f"ReMoEGate.update_coefficient: rate must be at least 1 and finite, got {rate}. Use 1.2."
        )
    gates = list(gates)
    device = gates[0].active.device
    # In integers, so that an average equal to K is seen as such.
    above = torch.zeros((), dtype=torch.int64, device=device)
    for gate in gates:
        above = above + (gate.active - gate.top_k * gate.tokens).to(device)
    step = math.log(rate) * torch.sign(above).to(torch.float32)
    for gate in gates:
        gate.coefficient.mul_(step.to(gate.coefficient.device).exp()).clamp_(*_RANGE)
        gate.active.zero_()
        gate.tokens.zero_()
