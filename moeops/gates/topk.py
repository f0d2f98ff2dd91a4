"""Configurable top-k gate and the routers of published models. T tokens, K experts per token, E experts, D width."""

from __future__ import annotations

from torch import Tensor

from moeops.gates.functional import balanced_route, check_balance, check_scale, router_logits
from moeops.gates.naive import NaiveGate
from moeops.ops.routing import SCORES, chosen_weights


class TopKGate(NaiveGate):
    """Send each token to its ``top_k`` best experts, with the score and the scaling of your choice.

    ``s = softmax(W x + b)`` over all experts or ``s = sigmoid(W x + b)``; the ``top_k`` largest are chosen. The
    weights are ``scale * s``, or ``scale * s / sum of the chosen s`` with ``renormalize``; softmax and
    ``renormalize`` together are the softmax over the chosen logits, as in ``NaiveGate``. With ``balance`` the loss
    is ``E * sum_e f_e * P_e``: ``f_e`` the share of the ``T * K`` choices that name ``e``, ``P_e`` the mean over the
    tokens of ``s_e / sum_j s_j``, 1 at perfect balance. ``balance="global"`` counts ``f_e`` over the tokens of all
    ranks of ``gate.group``: the global-batch balance of Qwen's models, see ``moeops.losses.balance_loss``.

    With ``top_k=1`` and ``renormalize`` every weight is ``scale``, and the router learns nothing from the output.

    ``MixtralGate``, ``Qwen3Gate`` and ``GptOssGate`` are this gate with the options of those models. ``Llama4Gate``
    is a gate of its own: its sigmoid scales the *input* of the expert, while these weights scale the output.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        gate_bias: give the router a bias.
        score: ``"softmax"`` or ``"sigmoid"``.
        renormalize: divide the chosen scores by their sum.
        scale: factor on the weights, above 0.
        balance: set the loss; ``"global"``: over all ranks of ``gate.group``, which has to be set on several ranks.

    Attributes:
        gate: the router, ``RouterLinear(D, E)``.

    Raises:
        ValueError: a number or ``score`` does not fit.  TypeError: a number is not an int.
    Source: Shazeer et al. 2017, arXiv:1701.06538; the loss: Switch Transformer, arXiv:2101.03961, equation 4; over
    the global batch: arXiv:2501.11873.

    Example:
        >>> gate = TopKGate(8, 4, top_k=2, score="sigmoid", scale=2.5)
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_weights.sum(-1).allclose(torch.full((5,), 2.5))
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
        score: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        balance: bool | str = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias)
        name = type(self).__name__
        if score not in SCORES:
            raise ValueError(
                f"{name}: score must be one of {SCORES}, got {score!r}. Pick one of them."
            )
        check_scale(name, scale)
        check_balance(name, balance)
        self.score = score
        self.renormalize = bool(renormalize)
        self.scale = float(scale)
        self.balance = balance

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
        group = self._balance_group() if self.balance == "global" else None
        topk_weights, topk_ids, loss = balanced_route(
            logits,
            self.top_k,
            balance=bool(self.balance),
            group=group,
            mask=mask,
            score=self.score,
            renormalize=self.renormalize,
            scale=self.scale,
        )
        self.set_loss(loss, logits, topk_ids, mask)
        if return_all_scores:
            return topk_ids, topk_weights, logits
        return topk_ids, topk_weights

    def weights_at(self, inp: Tensor, topk_ids: Tensor) -> Tensor:
        """Weights ``[T, K]`` that the router gives to experts chosen elsewhere, see ``moeops.RoutingReplay``."""
        return chosen_weights(
            router_logits(inp, self.gate),
            topk_ids,
            score=self.score,
            renormalize=self.renormalize,
            scale=self.scale,
        )

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"{super().extra_repr()}, score={self.score!r}, renormalize={self.renormalize}, "
            f"scale={self.scale}, balance={self.balance!r}"
        )


class MixtralGate(TopKGate):
    """Mixtral's router: the softmax over the chosen logits, top 2, no bias.

    ``balance=True`` sets the loss that Mixtral trains with, divided by ``K``. Args: as in ``TopKGate``.

    Source: Mixtral of Experts, arXiv:2401.04088, section 2.1.

    Example:
        >>> MixtralGate(8, 4)(torch.randn(5, 8))[1].sum(-1).allclose(torch.ones(5))
        True
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        *,
        balance: bool | str = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, False, balance=balance)


class Qwen3Gate(TopKGate):
    """Qwen3's router: softmax over all experts, top 8, renormalised or not, no bias.

    ``renormalize`` is the ``norm_topk_prob`` of a model's configuration, true in the published Qwen3 models. Without
    it the weights are the probabilities themselves, as in Qwen1.5-MoE. ``balance=True`` sets the loss that Qwen3
    trains with, divided by ``K`` and taken over this forward's tokens. Other args: as in ``TopKGate``.

    Source: Qwen3 technical report, arXiv:2505.09388, section 2.

    Example:
        >>> bool((Qwen3Gate(8, 16, renormalize=False)(torch.randn(5, 8))[1].sum(-1) < 1).all())
        True
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 8,
        *,
        renormalize: bool = True,
        balance: bool | str = False,
    ) -> None:
        super().__init__(
            d_model, num_expert, world_size, top_k, False, renormalize=renormalize, balance=balance
        )


class GptOssGate(TopKGate):
    """The router of gpt-oss: the softmax over the chosen logits, top 4, with a bias.

    Args: as in ``TopKGate``.

    Source: gpt-oss model card, arXiv:2508.10925, section 2.

    Example:
        >>> GptOssGate(8, 16)(torch.randn(5, 8))[0].shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 4,
        *,
        balance: bool | str = False,
    ) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, True, balance=balance)
