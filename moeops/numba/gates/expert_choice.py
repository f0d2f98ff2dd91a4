"""Expert choice: experts take their best tokens. T tokens, E experts, C tokens per expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeops.gates.base import BaseGate
from moeops.gates.functional import expert_capacity, router_logits
from moeops.numba._decorators import row_kernel
from moeops.types import Routing


@row_kernel(
    "moeops_numba::expert_choice",
    "scores[E, T], capacity: int -> weights[E, capacity]: float, tokens[E, capacity]: int64",
    require=("capacity <= T",),
    finite=("scores",),
)
def expert_choice(scores, capacity, weights, tokens):
    """Take the ``capacity`` tokens with the largest scores, best first, ties by lower token.

    A row is an expert. Reference: ``moeops.numba.gates.reference.expert_choice``.
    """
    # A heap whose root is the worst token that is kept: smaller score, or the later token of two equal ones.
    for t in range(len(scores)):
        value = scores[t]
        if t < capacity:
            place = t
            while place > 0:
                parent = (place - 1) // 2
                if weights[parent] < value:
                    break
                weights[place] = weights[parent]
                tokens[place] = tokens[parent]
                place = parent
            weights[place] = value
            tokens[place] = t
        elif capacity > 0 and value > weights[0]:
            sift(weights, tokens, capacity, value, t)
    # Take the worst off the heap, again and again, and fill from the back.
    for end in range(capacity - 1, 0, -1):
        value = weights[end]
        token = tokens[end]
        weights[end] = weights[0]
        tokens[end] = tokens[0]
        sift(weights, tokens, end, value, token)


def sift(weights, tokens, size, value, token):
    """Put an entry at the root of a heap of ``size`` and let it sink to its place."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and worse(weights, tokens, child + 1, child):
            child += 1
        if weights[child] > value or (weights[child] == value and tokens[child] < token):
            break
        weights[place] = weights[child]
        tokens[place] = tokens[child]
        place = child
    weights[place] = value
    tokens[place] = token


def worse(weights, tokens, a, b):
    """Entry ``a`` leaves before ``b``."""
    return weights[a] < weights[b] or (weights[a] == weights[b] and tokens[a] > tokens[b])


@expert_choice.gradient(saves=("scores", "tokens"))
def _expert_choice_gradient(grads, inputs, outputs):
    scores = inputs["scores"]
    grad = grads["weights"].to(scores.dtype)
    return {"scores": torch.zeros_like(scores).scatter(1, outputs["tokens"], grad)}


class ExpertChoiceGate(BaseGate):
    """Each expert takes its ``C`` best tokens by ``softmax(W x)`` over the experts; a token has 0 to E experts.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: average number of experts per token; ``C = ceil(top_k * T / E)``, at most ``T``.
        gate_bias: give the router a bias.
    Source: Zhou et al. 2022, arXiv:2202.09368.

    Example:
        >>> routing = ExpertChoiceGate(8, 4, 1, top_k=2)(torch.randn(6, 8))
        >>> (routing.topk_ids >= 0).sum(0).tolist()
        [3, 3, 3, 3]
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
        self.top_k = top_k
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)

    def forward(self, inp: Tensor) -> Routing:
        """Choose tokens: slot ``e`` of a token holds expert ``e``, or -1 if that expert did not take it."""
        num_tokens, num_experts = inp.shape[0], self.tot_expert
        scores = torch.softmax(router_logits(inp, self.gate), dim=-1)  # [T, E]
        capacity = expert_capacity(1.0, num_tokens, min(self.top_k, num_experts), num_experts)
        weights, tokens = expert_choice(scores.t().contiguous(), capacity)  # [E, C]
        experts = torch.arange(num_experts, device=inp.device)[:, None].expand_as(tokens)
        ids = torch.full_like(scores, -1, dtype=torch.int64).t()
        ids = ids.scatter(1, tokens, experts).t()
        topk_weights = torch.zeros_like(scores).t().scatter(1, tokens, weights).t()
        return Routing(ids.contiguous(), topk_weights.contiguous(), capacity * num_experts)
