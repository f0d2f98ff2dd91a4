"""GShard's top-2 gate. T tokens, K = 2 experts per token, E experts, D model width."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moeops.gates._fastmoe_names import accept_fastmoe_names
from moeops.gates._limited import LimitedGate
from moeops.gates.functional import (
    Count,
    balanced_route,
    check_balance,
    check_capacity,
    check_capacity_options,
    expert_capacity,
    router_logits,
    uniform_like,
)


class GShardGate(LimitedGate):
    """Send each token to its two best experts, the second one at random, as in GShard.

    The weights are the softmax over the two chosen logits and are not rescaled when one of them is dropped. The loss
    is ``E * sum_e c_e * m_e`` with ``c_e`` the share of tokens whose first choice is ``e`` and ``m_e`` the mean of
    ``softmax(logits)_e``, 1 at perfect balance. A second choice is dropped when ``2 * w2 < U(0, 1)``. Each expert
    takes ``ceil(factor * T * 2 / E)`` pairs: all first choices in token order, then second choices; ``drop_policy``
    names another order. A pair that does not fit gets id -1 and adds nothing to the output.

    ``DCGate`` is this gate with one capacity for the tokens of all ranks. With ``balance="global"`` ``c_e`` counts the
    tokens of all ranks of ``group``; see ``moeops.losses.balance_loss``.

    Departures from FastMoE's gate of the same name:

    - Random routing runs in training only; with ``random_routing="always"`` also in evaluation, as FastMoE's does.
    - It comes before the capacity limit, so that a pair dropped at random takes no room from another one.
    - First choices come before second ones when an expert overflows (the paper's order); FastMoE's losers are those
      that its atomics happen to pick.
    - The loss is 1 at balance on any number of ranks; FastMoE's shrinks with the square of the world size.
    - The first choice is the better one; FastMoE takes column 0 of an unsorted top-k.

    ``compat=True`` gives FastMoE's numbers where they differ by design: the loss divided by ``world_size ** 2``,
    ``floor(ceil(factor * T) * 2 / E)`` pairs per expert, the limit before the random routing, and that in evaluation
    too. The first choice and the order of overflow stay as they are here.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: must be 2; also as ``topk``, FastMoE's name.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        random_routing: drop second choices at random: ``True`` in training, ``False`` never, ``"always"``.
        gate_bias: give the router a bias.
        drop_policy: who stays when an expert overflows: ``"choice"``, ``"position"``, ``"priority"``, ``"batch"`` or
            ``"random"``; see ``apply_capacity``.
        balance: set the loss; ``"global"``: ``c_e`` over all ranks of ``group``; ``False`` for no loss.
        compat: FastMoE's numbers.
        group: the other ranks, a process group; a layer may set it later.

    Raises:
        ValueError: ``top_k`` is not 2, another argument does not fit, or ``group`` is missing when it is needed.
    Source: GShard, arXiv:2006.16668, algorithm 1.

    Example:
        >>> gate = GShardGate(8, 4, 1).eval()
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_ids.shape, topk_weights.sum(-1).allclose(torch.ones(5))
        (torch.Size([5, 2]), True)
    """

    global_capacity = False

    @accept_fastmoe_names
    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        capacity: tuple[float, float] | float | None = (1.2, 2.4),
        random_routing: bool | str = True,
        gate_bias: bool = True,
        *,
        drop_policy: str = "choice",
        balance: bool | str = True,
        compat: bool = False,
        group: Any = None,
    ) -> None:
        name = type(self).__name__
        if top_k != 2:
            raise ValueError(f"{name}: top_k must be 2, got {top_k!r}. Pass top_k=2 to the layer.")
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        if random_routing not in (True, False, "always"):
            raise ValueError(
                f"{name}: random_routing must be True, False or 'always', got {random_routing!r}. Pick one of them."
            )
        check_capacity_options(name, drop_policy, self.global_capacity)
        check_balance(name, balance)
        self.capacity = check_capacity(name, capacity)
        self.random_routing = random_routing
        self.drop_policy = drop_policy
        self.balance = balance
        self.compat = bool(compat)
        self.group = group

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose two experts per token: ``inp [T, D]`` to topk_ids ``[T, 2]`` and topk_weights ``[T, 2]``."""
        logits = router_logits(inp, self.gate)  # [T, E]
        group = self._balance_group() if self.balance == "global" else None
        topk_weights, topk_ids, loss = balanced_route(
            logits, 2, balance=bool(self.balance), num_counted=1, group=group, mask=mask
        )
        if loss is not None and self.compat:
            loss = loss / self.world_size**2
        self.set_loss(loss, logits, topk_ids, mask)
        if self.compat:
            topk_ids = self._limit(topk_ids, topk_weights, mask)
            topk_ids = self._route_at_random(topk_ids, topk_weights)
        else:
            topk_ids = self._route_at_random(topk_ids, topk_weights)
            topk_ids = self._limit(topk_ids, topk_weights, mask)
        return topk_ids, topk_weights

    def _route_at_random(self, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Drop second choices, the more likely the smaller their weights."""
        always = self.random_routing == "always" or self.compat
        if not self.random_routing or not (always or self.training):
            return topk_ids
        # First choices stay: their weights are at least 1 / 2.
        weights = topk_weights.detach()
        return topk_ids.masked_fill(weights < uniform_like(weights[:, :1], 0.0, 0.5), -1)

    def _rows(self, factor: float, num_tokens: Count) -> Count:
        """Pairs per expert."""
        if self.compat:
            return expert_capacity(factor, num_tokens, 1, 1) * 2 // self.tot_expert
        return super()._rows(factor, num_tokens)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, capacity={self.capacity}, random_routing={self.random_routing!r}, "
            f"drop_policy={self.drop_policy!r}, balance={self.balance!r}, compat={self.compat}"
        )
