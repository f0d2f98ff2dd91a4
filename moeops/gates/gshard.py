"""GShard's top-2 gate. T tokens, K = 2 experts per token, E experts, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.gates.functional import check_capacity, expert_capacity, router_logits
from moeops.gates.naive import NaiveGate
from moeops.losses import gshard_loss
from moeops.ops.routing import topk_route
from moeops.ops.sorting import limit_capacity


class GShardGate(NaiveGate):
    """Send each token to its two best experts, the second one at random, as in GShard.

    The weights are the softmax over the two chosen logits and are not rescaled when one of them is dropped. The loss
    is ``E * sum_e c_e * m_e`` with ``c_e`` the share of tokens whose first choice is ``e`` and ``m_e`` the mean of
    ``softmax(logits)_e``, 1 at perfect balance. A second choice is dropped when ``2 * w2 < U(0, 1)``. Each expert
    takes ``ceil(factor * T * 2 / E)`` pairs: all first choices in token order, then second choices.

    Departures from FastMoE's gate of the same name:

    - Random routing runs in training only; with ``random_routing="always"`` also in evaluation, as FastMoE's does.
    - It comes before the capacity limit, so that a pair dropped at random takes no room from another one.
    - First choices come before second ones when an expert overflows (the paper's order); FastMoE's losers are those
      that its atomics happen to pick.
    - The loss is 1 at balance on any number of ranks; FastMoE's shrinks with the square of the world size.
    - The first choice is the better one; FastMoE takes column 0 of an unsorted top-k.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        topk: must be 2.
        capacity: capacity factors (training, evaluation), one factor for both, or ``None`` for no limit.
        random_routing: drop second choices at random: ``True`` in training, ``False`` never, ``"always"``.
        gate_bias: give the router a bias.

    Raises:
        ValueError: ``topk`` is not 2, or another argument does not fit.
    Source: GShard, arXiv:2006.16668, algorithm 1.

    Example:
        >>> gate = GShardGate(8, 4, 1).eval()
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_ids.shape, topk_weights.sum(-1).allclose(torch.ones(5))
        (torch.Size([5, 2]), True)
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        topk: int = 2,
        capacity: tuple[float, float] | float | None = (1.2, 2.4),
        random_routing: bool | str = True,
        gate_bias: bool = True,
    ) -> None:
        name = type(self).__name__
        if topk != 2:
            raise ValueError(f"{name}: topk must be 2, got {topk!r}. Pass top_k=2 to the layer.")
        super().__init__(d_model, num_expert, world_size, topk, gate_bias)
        if random_routing not in (True, False, "always"):
            raise ValueError(
                f"{name}: random_routing must be True, False or 'always', got {random_routing!r}. Pick one of them."
            )
        self.capacity = check_capacity(name, capacity)
        self.random_routing = random_routing

    def forward(  # type: ignore[override]
        self, inp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose two experts per token: ``inp [T, D]`` to topk_ids ``[T, 2]`` and topk_weights ``[T, 2]``."""
        logits = router_logits(inp, self.gate)  # [T, E]
        topk_weights, topk_ids = topk_route(logits, 2)
        self.set_loss(gshard_loss(logits, topk_ids))
        if self.random_routing == "always" or (self.random_routing and self.training):
            first, second = topk_ids.unbind(1)  # [T] each
            weight = topk_weights[:, 1].detach()
            second = torch.where(2 * weight < torch.rand_like(weight), -1, second)
            topk_ids = torch.stack((first, second), dim=1)
        if self.capacity is not None:
            factor = self.capacity[0 if self.training else 1]
            rows = expert_capacity(factor, inp.shape[0], 2, self.tot_expert)
            # Ties go in token order, so this ranks every first choice above every second one.
            choice = torch.arange(2, device=topk_ids.device, dtype=topk_weights.dtype)
            priority = (-choice).expand(topk_ids.shape)
            topk_ids = limit_capacity(topk_ids, self.tot_expert, rows, priority=priority)
        return topk_ids, topk_weights

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return f"{super().extra_repr()}, capacity={self.capacity}, random_routing={self.random_routing!r}"
