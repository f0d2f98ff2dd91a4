"""Gate by probability mass. T tokens, K slots per token, E experts, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.gates._variable_k import VariableGate
from moeops.gates.functional import router_logits
from moeops.losses import mask_route, router_entropy, score_shares
from moeops.ops.balance import topk_route_balance
from moeops.ops.routing import chosen_weights
from moeops.types import Routing


class ThresholdGate(VariableGate):
    """Send each token to as many experts as it takes to reach a probability mass: top-p routing.

    ``p = softmax(W x + b)`` over all experts, sorted. A token gets the smallest set of best experts whose mass
    reaches ``top_p``, without those below ``min_prob``; never fewer than the best one, never more than ``top_k``. The
    weights are the probabilities, divided by their sum with ``renormalize``. An uncertain router means many experts:
    the harder a token, the more work it gets.

    The loss, on request, is ``balance + dynamic * entropy``: ``balance = E * sum_e f_e * P_e`` with ``f_e`` the share
    of all chosen pairs that name ``e`` and ``P_e`` the mean of ``p_e``, 1 at perfect balance, and the mean entropy of
    ``p``, which pulls towards few experts ("dynamic loss"). The paper's balance loss is that times the mean number of
    experts per token; its factors are 0.01 and 0.0001, here ``dynamic=0.01`` and 0.01 on the whole loss.

    The shape of ids and weights is ``[T, K]`` all the same, empty slots have id -1. With ``row_budget`` (see
    ``VariableGate``) the last choices are dropped first, of the same choice those with the lowest probability: with a
    budget of at least 1 every token keeps its best expert. Which slots are dropped depends on the other tokens.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``, the most experts a token can get.
        gate_bias: give the router a bias.
        top_p: mass to reach, in (0, 1]; 1 for no limit.
        min_prob: least probability of an expert, in [0, 1).
        renormalize: divide the weights by their sum; not changed by what the row budget drops.
        balance: set the balance loss.
        dynamic: factor of the entropy in the loss.
        row_budget: experts per token that there are rows for on average; ``None`` for ``K``.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.
        dropped: slots lost to the row budget, int64; not saved.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: Harder Tasks Need More Experts, arXiv:2403.07652, section 3.

    Example:
        >>> gate = ThresholdGate(8, 4, top_k=4, top_p=0.5)
        >>> topk_ids, topk_weights, num_rows, _ = gate(torch.randn(5, 8))
        >>> bool((topk_weights.sum(-1) >= 0.5).all()), num_rows
        (True, None)
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
        *,
        top_p: float = 0.4,
        min_prob: float = 0.0,
        renormalize: bool = False,
        balance: bool = False,
        dynamic: float = 0.0,
        row_budget: float | None = None,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias, row_budget)
        name = type(self).__name__
        if not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
            raise ValueError(f"{name}: top_p must be in (0, 1], got {top_p!r}. Use 1 for no limit.")
        if not isinstance(min_prob, (int, float)) or not 0 <= min_prob < 1:
            raise ValueError(
                f"{name}: min_prob must be in [0, 1), got {min_prob!r}. Use 0 for no threshold."
            )
        if not isinstance(dynamic, (int, float)) or not 0 <= dynamic < float("inf"):
            raise ValueError(
                f"{name}: dynamic must be at least 0 and finite, got {dynamic!r}. Use 0 for none."
            )
        self.top_p = float(top_p)
        self.min_prob = float(min_prob)
        self.renormalize = bool(renormalize)
        self.balance = bool(balance)
        self.dynamic = float(dynamic)

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> Routing:
        """Choose experts: ``inp [T, D]`` to a Routing of ``[T, K]`` ids and weights, best first."""
        logits = router_logits(inp, self.gate)  # [T, E]
        route = topk_route_balance(
            logits,
            self.top_k,
            renormalize=self.renormalize,
            top_p=self.top_p,
            min_score=self.min_prob,
        )
        weights, _, balance, topk_ids, _ = mask_route(route, lambda: score_shares(logits), mask)
        loss = balance if self.balance else None
        if self.dynamic > 0:
            entropy = self.dynamic * router_entropy(logits, mask=mask)
            loss = entropy if loss is None else loss + entropy
        self.set_loss(loss, logits, topk_ids, mask)
        return self._fit(topk_ids, weights, lambda: self._priority(logits.detach(), topk_ids), mask)

    def _priority(self, logits: Tensor, topk_ids: Tensor) -> Tensor:
        """Earlier choices first, then larger probabilities, which are at most 1."""
        probs = chosen_weights(logits, topk_ids, renormalize=False)  # [T, K]
        return probs - 2 * torch.arange(self.top_k, device=probs.device)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, top_p={self.top_p}, min_prob={self.min_prob}, "
            f"renormalize={self.renormalize}, balance={self.balance}, dynamic={self.dynamic}"
        )
