"""Sigmoid gate. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

from moeops.gates.topk import TopKGate


class SigmoidGate(TopKGate):
    """Weight the ``top_k`` best experts by the sigmoid of their logits, each on its own.

    ``h = W x + b``; the ``top_k`` largest ``h`` are chosen, and the weight of expert ``e`` is ``sigmoid(h_e)``. The
    weights do not compete: they do not sum to 1, and with ``top_k=1`` the router still learns from the output. This is
    the sigmoid gate of FSMoE, and with ``top_k=1, gate_bias=False`` the weighting of BASE layers and StableMoE; it is
    ``TopKGate`` with ``score="sigmoid", renormalize=False``. Nothing is dropped.

    With ``balance`` the loss is that of ``TopKGate``: ``E * sum_e f_e * P_e`` with the sigmoids of a token divided by
    their sum in ``P_e``.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        gate_bias: give the router a bias.
        balance: set the loss; ``"global"``: over all ranks of ``gate.group``.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: FSMoE, arXiv:2501.10714, section 2; BASE layers, arXiv:2103.16716; StableMoE, arXiv:2204.08396.

    Example:
        >>> gate = SigmoidGate(8, 4, 1, top_k=2)
        >>> x = torch.randn(5, 8)
        >>> topk_ids, topk_weights = gate(x)
        >>> topk_weights.allclose(torch.sigmoid(gate.gate(x)).gather(1, topk_ids))
        True
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
        *,
        balance: bool | str = False,
    ) -> None:
        super().__init__(
            d_model,
            num_expert,
            world_size,
            top_k,
            gate_bias,
            score="sigmoid",
            renormalize=False,
            balance=balance,
        )
