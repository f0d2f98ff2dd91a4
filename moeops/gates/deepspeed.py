"""DeepSpeed-MoE's gate. T tokens, K experts per token, E experts, D model width, C capacity in rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops.gates.functional import (
    apply_capacity,
    check_capacity,
    expert_capacity,
    router_logits,
)
from moeops.gates.naive import NaiveGate
from moeops.losses import mask_route, score_balance_loss, score_shares
from moeops.ops.balance import topk_route_balance
from moeops.ops.routing import chosen_weights

NOISE_POLICIES = (None, "Jitter", "RSample")
DROP_POLICIES = ("priority", "position")
_JITTER = 0.01


class DeepSpeedGate(NaiveGate):
    """Gate tokens as DeepSpeed-MoE does: top 1 with random token selection, top 2 with sampling, or top ``K``.

    ``p = softmax(W x)`` over all experts, no bias. Each expert takes ``C = max(ceil(factor * T * K / E),
    min_capacity)`` pairs, with ``capacity=None`` all of them.

    - ``K = 1``: the expert with the largest ``p``, weight ``p``. In training ``use_rts`` (random token selection)
      chooses at random which tokens an expert keeps, else the first ones. With ``"RSample"`` the expert is a sample of
      ``p`` in training (by Gumbel-max).
    - ``K = 2``: the largest ``p`` and, in training with ``top2_2nd_expert_sampling``, a sample of the others (``p``
      without the first, scaled to 1), else the second largest. First choices come before second ones.
    - ``K > 2``: the ``K`` largest; each expert keeps the pairs with the largest ``p`` (``drop_policy="priority"``) or
      those of the first tokens (``"position"``).

    For ``K >= 2`` the weights are ``p`` divided by the sum over the token's choices that were kept. The loss is
    ``E * sum_e f_e * P_e`` with ``f_e`` the share of first choices that name ``e`` (``K > 2``: of all choices), before
    any is dropped. ``"Jitter"`` multiplies the router's input by ``U(0.99, 1.01)`` in training.

    Departures from DeepSpeed:

    - Random token selection and the sampled second expert are for training only; DeepSpeed draws in evaluation too,
      so that its evaluation is not reproducible. ``compat=True`` draws there too.
    - ``capacity=None`` limits nothing: DeepSpeed, with ``drop_tokens=False``, takes the largest load of all ranks as
      the capacity, which drops nothing either but makes buffers of that size and reduces over the ranks for it.
    - Without random token selection the first tokens are kept; DeepSpeed keeps those that a top-k over ties happens to
      pick.
    - ``T`` may be below ``min_capacity``.
    - ``"RSample"`` with ``K > 1``, which DeepSpeed ignores, is refused.
    - The names of the arguments: ``capacity=(training, evaluation)`` for DeepSpeed's ``capacity_factor`` and
      ``eval_capacity_factor``, and ``None`` for ``drop_tokens=False``; ``drop_policy="priority"`` for ``"probs"``.
    - ``used_token`` works for any ``K``; DeepSpeed ignores it for ``K >= 2``.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, DeepSpeed's ``k``.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        min_capacity: least rows per expert, at least 0.
        noisy_gate_policy: ``None``, ``"Jitter"`` or ``"RSample"``.
        use_rts: random token selection, for ``K = 1``.
        top2_2nd_expert_sampling: sample the second expert, for ``K = 2``.
        drop_policy: ``"priority"`` or ``"position"``, for ``K > 2``.
        compat: draw in evaluation too, as DeepSpeed does.

    Attributes:
        gate: the router, ``RouterLinear(D, E)`` without bias.

    Raises:
        ValueError: a number or a policy does not fit.  TypeError: a number is not an int.
    Source: DeepSpeed-MoE, arXiv:2201.05596; GShard, arXiv:2006.16668.

    Example:
        >>> gate = DeepSpeedGate(8, 4, top_k=1, min_capacity=0)
        >>> topk_ids, _ = gate(torch.zeros(8, 8))
        >>> sorted(topk_ids.view(-1).tolist())
        [-1, -1, -1, -1, -1, -1, 0, 0]
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 1,
        *,
        capacity: tuple[float, float] | float | None = 1.0,
        min_capacity: int = 4,
        noisy_gate_policy: str | None = None,
        use_rts: bool = True,
        top2_2nd_expert_sampling: bool = True,
        drop_policy: str = "priority",
        compat: bool = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        name = type(self).__name__
        _checks.check_int(name, "min_capacity", min_capacity, 0, "Use 0 for none.")
        if noisy_gate_policy not in NOISE_POLICIES:
            raise ValueError(
                f"{name}: noisy_gate_policy must be one of {NOISE_POLICIES}, got {noisy_gate_policy!r}. Pick one."
            )
        if noisy_gate_policy == "RSample" and top_k > 1:
            raise ValueError(
                f"{name}: noisy_gate_policy must be None or 'Jitter' for top_k > 1, got 'RSample' with top_k={top_k}. "
                "With top_k=2 top2_2nd_expert_sampling samples."
            )
        if drop_policy not in DROP_POLICIES:
            raise ValueError(
                f"{name}: drop_policy must be one of {DROP_POLICIES}, got {drop_policy!r}. Pick one of them."
            )
        self.capacity = check_capacity(name, capacity)
        self.min_capacity = min_capacity
        self.noisy_gate_policy = noisy_gate_policy
        self.use_rts = bool(use_rts)
        self.top2_2nd_expert_sampling = bool(top2_2nd_expert_sampling)
        self.drop_policy = drop_policy
        self.compat = bool(compat)

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, used_token: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            inp: tokens, ``[T, D]``, any float type.
            used_token: ``T`` numbers; tokens with a 0 go to no expert and count as no choice in the loss. Unlike masked
                ones they count in the capacity and in the loss's means, as in DeepSpeed.
            mask: ``[T]``, tokens that are not there; see ``BaseGate``.

        Returns:
            topk_ids ``[T, K]`` int64 and topk_weights ``[T, K]`` float32 (float64 for float64).

        Raises:
            ValueError: a shape does not fit.
        """
        if used_token is not None and not torch.compiler.is_compiling():
            _checks.check_size(
                type(self).__name__, "used_token", used_token, 0, inp.shape[0], "one per token"
            )
        draws = self.training or self.compat
        jitter = _JITTER if self.noisy_gate_policy == "Jitter" and self.training else 0.0
        logits = router_logits(inp, self.gate, jitter=jitter)  # [T, E]
        samples = self.noisy_gate_policy == "RSample" and self.training
        samples = samples or (self.top_k == 2 and draws and self.top2_2nd_expert_sampling)
        num_counted = self.top_k if self.top_k > 2 else 1
        route = topk_route_balance(
            logits,
            self.top_k,
            renormalize=False,
            uniform=torch.rand_like(logits[:, 0]) if samples else None,
            num_counted=num_counted,
        )
        every = route.topk_ids
        route = mask_route(route, lambda: score_shares(logits), mask, num_counted)
        probs, _, loss, topk_ids, _ = route
        if used_token is not None:
            topk_ids = torch.where(used_token[:, None] == 0, -1, topk_ids)
            loss = score_balance_loss(logits, topk_ids[:, :num_counted], mask=mask)
        self.set_loss(loss, logits, topk_ids, mask)
        if self.capacity is not None:
            topk_ids = self._limit(topk_ids, probs, draws, mask)
        if self.top_k == 1:
            return topk_ids, probs
        weighed = topk_ids if mask is None else torch.where((mask != 0)[:, None], every, topk_ids)
        return topk_ids, chosen_weights(logits, weighed)

    def _limit(self, topk_ids: Tensor, probs: Tensor, draws: bool, mask: Tensor | None) -> Tensor:
        """Drop what is over the capacity."""
        if self.top_k == 1:
            policy = "random" if self.use_rts and draws else "position"
        elif self.top_k == 2:
            policy = "choice"
        else:
            policy = self.drop_policy
        return apply_capacity(
            topk_ids, probs, self.tot_expert, self._rows, policy=policy, mask=mask
        )

    def _rows(self, num_tokens: Any) -> Any:
        """Pairs per expert."""
        assert self.capacity is not None
        factor = self.capacity[0 if self.training else 1]
        rows = expert_capacity(factor, num_tokens, self.top_k, self.tot_expert)
        least = self.min_capacity
        if isinstance(rows, Tensor):
            return rows.clamp_min(least)
        # Dynamo, where a symbolic number passes for an int, knows max; sym_max of plain ints stops it in torch 2.11.
        return torch.sym_max(rows, least) if isinstance(rows, torch.SymInt) else max(rows, least)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, capacity={self.capacity}, min_capacity={self.min_capacity}, "
            f"noisy_gate_policy={self.noisy_gate_policy!r}, use_rts={self.use_rts}, "
            f"top2_2nd_expert_sampling={self.top2_2nd_expert_sampling}, drop_policy={self.drop_policy!r}, "
            f"compat={self.compat}"
        )
