"""X-MoE's cosine gate. T tokens, K experts per token, E experts, D model width, P projected width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops import _checks
from moeops.gates.base import BaseGate, check_top_k
from moeops.gates.functional import (
    RouterLinear,
    balanced_route,
    check_balance,
    exact_linear,
    router_logits,
)
from moeops.ops.routing import SCORES

_MAX_SCALE = 100.0


class XMoEGate(BaseGate):
    """Choose experts by the cosine between a low-rank projection of the token and a learned vector per expert.

    ``h_e = s * cos(W x + b, v_e)`` with ``W x`` in ``P`` dimensions and ``s`` a learned factor, the inverse of a
    temperature: at most 100, and ``1 / init_t`` at the start. The ``top_k`` best are chosen; the weights are
    ``softmax(h)`` over all experts or ``sigmoid(h)``, divided by the sum over the chosen with ``renormalize``. The
    length of neither vector counts, which keeps hidden states from collapsing towards the experts' directions.

    With ``balance`` the loss is ``E * sum_e f_e * P_e`` as in ``TopKGate``. Nothing is dropped.

    X-MoE routes to one expert with its probability as weight; FSMoE to two. Tutel's ``cosine_top`` is this gate with
    ``renormalize=True`` for ``top_k > 1``. The factor is kept as its logarithm, ``log_scale``, as there. Cosines are
    computed in float32 (float64 for float64 ``x``), also in a bfloat16 model and under autocast.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.
        gate_bias: give the projection a bias, as Tutel does; the paper's has none.
        proj_dim: ``P``.
        init_t: temperature at the start, at least 0.01.
        score: ``"softmax"`` or ``"sigmoid"``.
        renormalize: divide the chosen scores by their sum.
        balance: set the loss; ``"global"``: over all ranks of ``gate.group``.

    Attributes:
        projector: ``RouterLinear(D, P)``.
        expert_vectors: ``[E, P]``, the ``v_e``, drawn from ``N(0, 0.01 ** 2)``.
        log_scale: scalar, ``log s``; values above ``log 100`` act as ``log 100`` and get no gradient.

    Raises:
        ValueError: a number or ``score`` does not fit.  TypeError: a number is not an int.
    Source: X-MoE, arXiv:2204.09179, section 3; Tutel, arXiv:2206.03382; FSMoE, arXiv:2501.10714, section 2.

    Example:
        >>> gate = XMoEGate(8, 4, 1, proj_dim=6)
        >>> topk_ids, topk_weights, logits = gate(torch.randn(5, 8), return_all_scores=True)
        >>> topk_ids.shape, bool((logits.abs() <= 2).all())
        (torch.Size([5, 2]), True)
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int = 1,
        top_k: int = 2,
        gate_bias: bool = True,
        *,
        proj_dim: int = 256,
        init_t: float = 0.5,
        score: str = "softmax",
        renormalize: bool = False,
        balance: bool | str = False,
    ) -> None:
        super().__init__(num_expert, world_size)
        name = type(self).__name__
        _checks.check_int(name, "d_model", d_model, 1, "Pass the width of x.")
        _checks.check_int(name, "proj_dim", proj_dim, 1, "Pass the width of the projection.")
        check_top_k(name, top_k, self.tot_expert)
        if not isinstance(init_t, (int, float)) or not 1 / _MAX_SCALE <= init_t < math.inf:
            raise ValueError(
                f"{name}: init_t must be at least {1 / _MAX_SCALE} and finite, got {init_t!r}. Use 0.5."
            )
        if score not in SCORES:
            raise ValueError(
                f"{name}: score must be one of {SCORES}, got {score!r}. Pick one of them."
            )
        self.d_model = d_model
        self.top_k = top_k
        self.proj_dim = proj_dim
        self.init_t = float(init_t)
        self.score = score
        self.renormalize = bool(renormalize)
        check_balance(type(self).__name__, balance)
        self.balance = balance
        self.projector = RouterLinear(d_model, proj_dim, bias=gate_bias)
        self.expert_vectors = nn.Parameter(torch.empty(self.tot_expert, proj_dim))
        self.log_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new expert vectors and reset the temperature; the projection resets itself."""
        nn.init.normal_(self.expert_vectors, std=0.01)
        nn.init.constant_(self.log_scale, -math.log(self.init_t))

    def forward(
        self, inp: Tensor, return_all_scores: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Choose experts.

        Args:
            inp: tokens, ``[T, D]``, any float type.
            return_all_scores: also return the scaled cosines.
            mask: ``[T]``, tokens that are not there; see ``BaseGate``.

        Returns:
            topk_ids ``[T, K]`` int64, topk_weights ``[T, K]`` float32 (float64 for float64), and on request the
            scaled cosines ``[T, E]``.
        """
        projected = router_logits(inp, self.projector)  # [T, P]
        vectors = F.normalize(self.expert_vectors.to(projected.dtype), dim=1)  # [E, P]
        cosines = exact_linear(F.normalize(projected, dim=1), vectors)  # [T, E]
        scale = self.log_scale.to(projected.dtype).clamp(max=math.log(_MAX_SCALE)).exp()
        logits = cosines * scale
        group = self._balance_group() if self.balance == "global" else None
        topk_weights, topk_ids, loss = balanced_route(
            logits,
            self.top_k,
            balance=bool(self.balance),
            group=group,
            mask=mask,
            score=self.score,
            renormalize=self.renormalize,
        )
        self.set_loss(loss, logits, topk_ids, mask)
        if return_all_scores:
            return topk_ids, topk_weights, logits
        return topk_ids, topk_weights

    def extra_repr(self) -> str:
        """Sizes and options of the gate."""
        return (
            f"num_expert={self.num_expert}, world_size={self.world_size}, top_k={self.top_k}, "
            f"proj_dim={self.proj_dim}, score={self.score!r}, renormalize={self.renormalize}, balance={self.balance}"
        )
