"""Llama 4's gate. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

from torch import Tensor

from moeops.gates.functional import balanced_route, check_balance, router_logits
from moeops.gates.naive import NaiveGate
from moeops.types import Routing


class Llama4Gate(NaiveGate):
    """Send each token to its ``top_k`` best experts, and scale what the experts see of it, as in Llama 4.

    ``s = sigmoid(W x)``; the ``top_k`` largest are chosen, and expert ``e`` computes on ``s_e * x``. The outputs are
    added without weights. The record says ``scale_inputs``; a layer then copies each token once per chosen expert.
    With ``balance`` the loss is that of ``TopKGate``: ``E * sum_e f_e * P_e``, ``f_e`` the share of the ``T * K``
    choices that name ``e``, ``P_e`` the mean over the tokens of ``s_e / sum_j s_j``, 1 at perfect balance.

    Llama 4's layers add a shared expert to this: ``shared_expert=`` of the layer.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``; 1 in the published models.
        balance: set the loss; ``"global"``: over all ranks of ``gate.group``.

    Attributes:
        gate: the router, ``RouterLinear(D, E)`` without bias.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: Llama 4 (2025), as in transformers' ``Llama4Router`` and ``Llama4TextMoe``.

    Example:
        >>> routing = Llama4Gate(8, 4)(torch.randn(5, 8))
        >>> routing.topk_ids.shape, routing.scale_inputs
        (torch.Size([5, 1]), True)
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 1,
        *,
        balance: bool | str = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        check_balance(type(self).__name__, balance)
        self.balance = balance

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> Routing:
        """Choose experts: ``inp [T, D]`` to a Routing of ``[T, K]`` ids and input weights."""
        logits = router_logits(inp, self.gate)  # [T, E]
        group = self._balance_group() if self.balance == "global" else None
        topk_weights, topk_ids, loss = balanced_route(
            logits,
            self.top_k,
            balance=bool(self.balance),
            group=group,
            mask=mask,
            score="sigmoid",
            renormalize=False,
        )
        self.set_loss(loss, logits, topk_ids, mask)
        return Routing(topk_ids, topk_weights, scale_inputs=True)

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return f"{super().extra_repr()}, balance={self.balance!r}"
