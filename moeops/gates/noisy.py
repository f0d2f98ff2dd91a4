"""Noisy top-k gate. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops.gates.functional import router_logits
from moeops.gates.naive import NaiveGate
from moeops.losses import cv_squared, importance
from moeops.ops.routing import topk_route

_MIN_NOISE = 0.01


class NoisyGate(NaiveGate):
    """Send each token to the ``top_k`` best experts of noisy logits, as in the sparsely-gated mixture of experts.

    ``h = W x + n * sigma`` with ``n ~ N(0, 1)`` and ``sigma = softplus(W_noise x) + 0.01``; without noise in
    evaluation, ``h = W x``. The weights are the softmax over the chosen ``h``. The loss is ``CV2(importance) +
    CV2(load)`` with ``CV2 = var / mean ** 2`` over the experts: ``importance_e`` is the sum of the weights that ``e``
    got, ``load_e = sum_t P(e stays among the best K when its own noise is drawn again)``, which is
    ``Phi(((W x)_e - h') / sigma_e)`` with ``h'`` the K-th largest of the other experts' ``h``. In evaluation, and
    where every expert is chosen, ``load_e`` is the number of tokens of ``e``, which has no gradient.

    The noise is drawn by torch: ``torch.manual_seed`` reproduces it.

    Departures from FastMoE's gate of the same name:

    - ids and weights are ``[T, K]``; FastMoE's flat ids work for one expert per token only.
    - Evaluation has a loss; FastMoE divides by a sigma of 0.
    - The variance divides by ``E``, as in the paper's own code, not by ``E - 1``: one expert gives 0, not NaN.
    - The parameters are ``gate.weight`` and ``noise.weight``, ``[E, D]``; FastMoE's are ``w_gate`` and ``w_noise``,
      their transposes.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: ``K``.

    Attributes:
        gate: ``W``, ``nn.Linear(D, E)`` without bias.
        noise: ``W_noise``, the same.

    Raises:
        ValueError: a number does not fit.  TypeError: a number is not an int.
    Source: Shazeer et al. 2017, arXiv:1701.06538, sections 2.1 and 4, appendix A.

    Example:
        >>> gate = NoisyGate(8, 4, 1)
        >>> topk_ids, topk_weights = gate(torch.randn(5, 8))
        >>> topk_ids.shape, gate.get_loss().shape
        (torch.Size([5, 2]), torch.Size([]))
    """

    def __init__(self, d_model: int, num_expert: int, world_size: int = 1, top_k: int = 2) -> None:
        super().__init__(d_model, num_expert, world_size, top_k, gate_bias=False)
        self.noise = nn.Linear(d_model, self.tot_expert, bias=False)

    def forward(  # type: ignore[override]
        self, inp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose experts: ``inp [T, D]`` to topk_ids ``[T, K]`` and topk_weights ``[T, K]``."""
        clean = router_logits(inp, self.gate)  # [T, E]
        logits = clean
        if self.training:
            sigma = F.softplus(router_logits(inp, self.noise)) + _MIN_NOISE  # [T, E]
            logits = clean + torch.randn_like(clean) * sigma
        topk_weights, topk_ids = topk_route(logits, self.top_k)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, topk_ids, True)  # [T, E]
        if self.training and self.top_k < self.tot_expert:
            # The K-th best among the others: for a chosen expert the first one left out, else the last one let in.
            left_out = logits.masked_fill(chosen, -math.inf).amax(-1, keepdim=True)  # [T, 1]
            let_in = logits.gather(1, topk_ids[:, -1:])  # [T, 1]
            score = (clean - torch.where(chosen, left_out, let_in)) / sigma
            load = (0.5 * (1 + torch.erf(score / math.sqrt(2)))).sum(0)  # [E]
        else:
            load = chosen.to(logits.dtype).sum(0)
        weight_sums = importance(topk_weights, topk_ids, self.tot_expert)  # [E]
        self.set_loss(cv_squared(weight_sums) + cv_squared(load))
        return topk_ids, topk_weights
