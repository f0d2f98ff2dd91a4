"""Top-k softmax gate. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

from torch import Tensor

from moeops import _checks
from moeops._masks import drop_masked
from moeops.gates.base import BaseGate, check_top_k
from moeops.gates.functional import RouterLinear, router_logits
from moeops.ops.routing import chosen_weights, topk_route


class NaiveGate(BaseGate):
    """Send each token to its ``top_k`` best experts, weighted by the softmax over the chosen logits.

    Nothing is dropped and nothing is balanced. With ``top_k=1`` every weight is 1 and the router learns nothing.

    Departures from FastMoE's gate of the same name: the experts of a token come best first, the router computes in
    float32 whatever the model's type, and there is no dummy loss: ``has_loss`` is false and ``get_loss`` returns
    ``None`` (a loss is a side effect of the forward, which costs an output under a compiler and keeps torch from
    compiling an activation checkpoint around the layer).

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        gate_bias: give the router a bias.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.

    Example:
        >>> topk_ids, topk_weights = NaiveGate(8, 4, 1, top_k=2)(torch.randn(5, 8))
        >>> topk_ids.shape, topk_weights.sum(-1).allclose(torch.ones(5))
        (torch.Size([5, 2]), True)
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
    ) -> None:
        super().__init__(num_expert, world_size)
        name = type(self).__name__
        _checks.check_int(name, "d_model", d_model, 1, "Pass the width of x.")
        check_top_k(name, top_k, self.tot_expert)
        self.d_model = d_model
        self.top_k = top_k
        self.gate = RouterLinear(d_model, self.tot_expert, bias=gate_bias)

    def forward(
        self, inp: Tensor, return_all_scores: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            inp: tokens, ``[T, D]``, any float type.
            return_all_scores: also return the router's logits.
            mask: ``[T]``, tokens that are not there; see ``BaseGate``.

        Returns:
            topk_ids ``[T, K]`` int64, topk_weights ``[T, K]`` float32 (float64 for float64), and on request the
            logits ``[T, E]``.
        """
        logits = router_logits(inp, self.gate)  # [T, E]
        topk_weights, topk_ids = topk_route(logits, self.top_k)
        topk_ids = drop_masked(topk_ids, mask)
        self.set_loss(None, logits, topk_ids, mask)
        if return_all_scores:
            return topk_ids, topk_weights, logits
        return topk_ids, topk_weights

    def weights_at(self, inp: Tensor, topk_ids: Tensor) -> Tensor:
        """Weights ``[T, K]`` that the router gives to experts chosen elsewhere, see ``moeops.RoutingReplay``."""
        return chosen_weights(router_logits(inp, self.gate), topk_ids)

    def extra_repr(self) -> str:
        """Sizes of the gate."""
        return f"num_expert={self.num_expert}, world_size={self.world_size}, top_k={self.top_k}"
