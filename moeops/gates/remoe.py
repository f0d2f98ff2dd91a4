"""Gate with a ReLU for a router. T tokens, K experts per token on average, E experts, D model width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeops import _checks
from moeops._masks import drop_masked, hide_masked, num_unmasked
from moeops._tracing import exporting
from moeops.comm.collectives import all_reduce_sum
from moeops.gates._variable_k import VariableGate
from moeops.gates.functional import router_logits
from moeops.gates.recording import add_up
from moeops.losses import mask_route
from moeops.losses._common import TINY
from moeops.ops.balance import relu_route
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

    **Several ranks** with replicas of this gate must agree on the coefficient, as those of ``DeepSeekV3Gate`` on the
    bias: ``gate.update_coefficient(group=group)`` with the ranks that hold this gate sums their counts first. DDP
    does not sum buffers, but overwrites them with rank 0's: pass ``broadcast_buffers=False``.

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
        gate_bias: give the router a bias, which the paper does not. Without one, half of the logits stay positive
            whatever ``W`` is as long as ``x`` is symmetric around 0; what trained transformers feed to an MLP is not.
        coefficient: first value of the loss's strength, above 0.
        max_k: most experts a token can get; ``None`` for ``E``.
        row_budget: experts per token that there are rows for on average; ``None`` for ``max_k``.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.
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
    float32_buffers = ("coefficient",)

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        balance: bool = True,
        gate_bias: bool = False,
        coefficient: float = 1e-8,
        max_k: int | None = None,
        row_budget: float | None = None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias, row_budget)
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
        self.start_coefficient = float(coefficient)
        self.register_buffer("coefficient", torch.empty((), dtype=torch.float32))
        self.register_buffer("active", torch.empty((), dtype=torch.int64))
        self.register_buffer("tokens", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the coefficient to its first value and the counts to 0; the router resets itself."""
        super().reset_parameters()
        self.coefficient.fill_(self.start_coefficient)
        self.active.zero_()
        self.tokens.zero_()

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> Routing:
        """Weigh experts: ``inp [T, D]`` to a Routing of ``[T, max_k]`` ids and weights."""
        logits = router_logits(inp, self.gate)  # [T, E]
        route = mask_route(relu_route(logits), lambda: torch.relu(logits), mask)
        weights, norms, balance, topk_ids, counts = route  # [T, E], [E], [], ...
        active = counts.sum()
        if self.training:
            add_up(self.active, active)
            add_up(self.tokens, hide_masked(torch.ones_like(topk_ids[:, 0]), mask).sum())
        if not exporting():
            loss = self._loss(norms, balance, active, num_unmasked(inp, mask, norms.dtype))
            self.set_loss(loss, logits, topk_ids, mask)
        if self.max_k < self.tot_expert:
            best = torch.sort(weights.detach(), dim=-1, descending=True, stable=True)
            topk_ids = best.indices[:, : self.max_k]
            weights = weights.gather(1, topk_ids)
            topk_ids = drop_masked(torch.where(weights > 0, topk_ids, -1), mask)
        return self._fit(topk_ids, weights, lambda: weights, mask)

    def _loss(self, norms: Tensor, balance: Tensor, active: Tensor, num_tokens: Any) -> Tensor:
        if self.balance:
            # Its shares are of the active pairs; those of the paper are of K * T.
            norm = balance * active / (self.top_k * num_tokens + TINY)
        else:
            norm = norms.sum() / (num_tokens + TINY)
        # A copy: update_coefficient may come between forward and backward, which reads it.
        return self.coefficient.to(norm.dtype, copy=True) * norm

    def update_coefficient(self, rate: float = 1.2, group: Any = None) -> None:
        """Multiply the coefficient by ``rate`` if tokens got more than ``K`` experts, divide if fewer; clear counts.

        In place, without a host copy, one graph under ``torch.compile``. Without counts nothing moves.

        Args:
            rate: at least 1; the paper's is 1.2.
            group: sum the counts over these ranks first, a process group or ``moeops.distributed.RankGroup``; all of
                them must call this. ``None`` for the gate's own ``group``, and without one for this rank alone.

        Raises:
            ValueError: ``rate`` is below 1 or not finite, or no group is known with ``world_size > 1``.
        """
        _update([self], rate, group)

    def _update_group(self, group: Any) -> Any:
        """The ranks whose counts are summed."""
        group = self.group if group is None else group
        if group is None and self.world_size > 1:
            raise ValueError(
                f"{type(self).__name__}.update_coefficient: group must be set with world_size = {self.world_size}, "
                "got None. Pass the ranks that hold this gate."
            )
        return group

    def after_step(self, progress: float) -> None:
        """Update the coefficient of this gate alone; ``moeops.update_gates`` updates those of a model together."""
        self.update_coefficient()

    @classmethod
    def _after_step_together(cls, gates: Sequence[ReMoEGate], progress: float) -> None:
        _update(gates, 1.2, None)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return f"{super().extra_repr()}, balance={self.balance}, max_k={self.max_k}"


def update_coefficients(model: nn.Module, rate: float = 1.2, group: Any = None) -> None:
    """Update the coefficients of all ReMoE gates of a model alike, by the sparsity of all of them, as the paper does.

    As ``ReMoEGate.update_coefficient`` with the counts of all gates added up; coefficients that start equal stay so.

    Args:
        model: any module; every ``ReMoEGate`` in ``model.modules()`` takes part.
        rate: at least 1; the paper's is 1.2.
        group: as in ``ReMoEGate.update_coefficient``; ``None`` for the own groups of the gates.

    Raises:
        ValueError: ``rate`` is below 1 or not finite, the model has no such gate, or no group is known with
        ``world_size > 1``.

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
    _update(gates, rate, group)


@torch.no_grad()
def _update(gates: Sequence[ReMoEGate], rate: float, group: Any) -> None:
    if not torch.compiler.is_compiling() and not 1 <= rate < math.inf:
        raise ValueError(
            f"ReMoEGate.update_coefficient: rate must be at least 1 and finite, got {rate}. Use 1.2."
        )
    device = gates[0].active.device
    groups = [gate._update_group(group) for gate in gates]
    together = all(other == groups[0] for other in groups)
    # In integers, so that an average equal to K is seen as such.
    above = torch.zeros((), dtype=torch.int64, device=device)
    for gate, own in zip(gates, groups, strict=True):
        more = gate.active - gate.top_k * gate.tokens
        above = above + (more if together else all_reduce_sum(more, own)).to(device)
    if together:
        above = all_reduce_sum(above, groups[0])
    step = math.log(rate) * torch.sign(above).to(torch.float32)
    for gate in gates:
        gate.coefficient.mul_(step.to(gate.coefficient.device).exp()).clamp_(*_RANGE)
        gate.active.zero_()
        gate.tokens.zero_()
