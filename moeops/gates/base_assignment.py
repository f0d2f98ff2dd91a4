"""The gate of BASE layers: balanced assignment. T tokens, one expert per token, E experts, D model width."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moeops import _checks
from moeops._masks import drop_masked, hide_masked, num_unmasked
from moeops.gates.functional import (
    RouterLinear,
    priority_positions,
    router_logits,
)
from moeops.gates.naive import NaiveGate
from moeops.losses._common import TINY
from moeops.ops.routing import topk_route
from moeops.ops.sorting import count_tokens, limit_capacity

# Temperatures of the prices' iterations, in units of the scores' spread. Chosen on random, skewed, clustered and
# repeated scores up to T = 8192, E = 128: more of anything wins less than 0.1 % of the scores' range per token.
_FIRST_TEMPERATURE = 2.0
_LAST_TEMPERATURE = 0.01
_PRICE_ITERATIONS = 20
_ROUNDS = 6
_SWAPS = 4
_GOLDEN_RATIO = 0.6180339887498949
# Below every score less its price, and finite, so that differences of two of them are numbers.
_CLOSED = -1e30
# keep(requests [T], priority [T]) -> [T]: each expert keeps the highest priorities that it has room for, -1 elsewhere.
Keep = Callable[[Tensor, Tensor], Tensor]


class _Centroids(RouterLinear):
    """A router whose rows are orthogonal at the start."""

    def reset_parameters(self) -> None:
        """Draw orthogonal centroids of length 0.1; torch has no decomposition in half types."""
        with torch.no_grad():
            rows = torch.empty_like(self.weight, dtype=_checks.accumulate_dtype(self.weight.dtype))
            self.weight.copy_(nn.init.orthogonal_(rows, gain=0.1))


class BASEGate(NaiveGate):
    """Give every expert the same number of tokens by assignment instead of a loss, as in BASE layers.

    ``s = W x`` with one centroid per expert as a row of ``W``, orthogonal at the start (gain 0.1). In training
    ``balanced_assignment(s)`` sends each token to one expert so that every expert gets ``T // E`` or ``T // E + 1``
    tokens of this rank; in evaluation the expert is the one with the largest ``s``. The weight is ``sigmoid(s)`` of
    the chosen expert, which is how the centroids learn. No loss, nothing dropped.

    The paper's layer returns ``a * f(x) + (1 - a) * x`` with ``a`` the weight and ``f(x) = x + MLP(norm(x))`` the
    expert: that is ``x + a * MLP(norm(x))``, this gate with experts ``MLP(norm(x))`` inside a residual connection.

    Departures from fairseq's and HetuMoE's layers:

    - The solver is deterministic, takes any ``T``, 0 and those that ``E`` does not divide included, runs on the device
      without a copy to the host and in a fixed number of steps; theirs is an auction that asks the host after each
      round whether it is over. See ``balanced_assignment`` for what it promises.
    - Tokens are not shuffled between ranks before: each rank balances its own tokens, and so balances the sum.
    - The centroids are trained, as in fairseq; HetuMoE's are constants (``gate.requires_grad_(False)``).

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: must be 1.

    Attributes:
        gate: the centroids, ``RouterLinear(D, E)`` without bias.

    Raises:
        ValueError: ``top_k`` is not 1, or a number does not fit; on CPU also for logits that are NaN or infinite.
    Source: BASE layers, arXiv:2103.16716.

    Example:
        >>> topk_ids, _ = BASEGate(8, 4)(torch.randn(10, 8))
        >>> sorted(topk_ids.view(-1).bincount(minlength=4).tolist())
        [2, 2, 3, 3]
    """

    def __init__(self, d_model: int, num_expert: int, world_size: int = 1, top_k: int = 1) -> None:
        if top_k != 1:
            raise ValueError(
                f"{type(self).__name__}: top_k must be 1, got {top_k!r}. Pass top_k=1 to the layer."
            )
        super().__init__(d_model, num_expert, world_size, 1, gate_bias=False)
        self.gate = _Centroids(d_model, self.tot_expert, bias=False)

    def forward(  # type: ignore[override]  # only NaiveGate returns all scores
        self, inp: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose one expert per token: ``inp [T, D]`` to topk_ids ``[T, 1]`` and topk_weights ``[T, 1]``."""
        logits = router_logits(inp, self.gate)  # [T, E]
        if self.training:
            topk_ids = balanced_assignment(logits, mask).unsqueeze(1)
            chosen = topk_ids
            if mask is not None:
                best = logits.detach().argmax(-1, keepdim=True)
                chosen = torch.where(topk_ids < 0, best, topk_ids)
            topk_weights = torch.sigmoid(logits.gather(1, chosen))
        else:
            topk_weights, topk_ids = topk_route(logits, 1, score="sigmoid", renormalize=False)
            topk_ids = drop_masked(topk_ids, mask)
        self.set_loss(None, logits, topk_ids, mask)
        return topk_ids, topk_weights


@torch.no_grad()
def balanced_assignment(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Send each token to one expert, every expert getting ``T // E`` or ``T // E + 1``, for a large total score.

    In three steps of fixed length. Prices: Sinkhorn's iteration with a falling temperature looks for one price per
    expert at which the tokens that prefer it, by score less price, are ``T / E``. Rounds: each token without an expert
    asks for one of those it prefers among those with room, and an expert with too many takes those that would lose most
    by going elsewhere; tokens left after the last round fill the gaps. The ``T % E`` experts with the highest prices
    get one token more. Swaps: pairs of experts exchange the two tokens whose exchange wins most.

    The loads are exact, always. The total is near the largest possible one, not equal to it: on average over the tokens
    at most 2 % of the scores' range below it in the tests, for random, skewed, clustered and repeated tokens (10 %
    with fewer tokens than experts); usual are 0.1 %, and 1 % where most tokens repeat.

    Args:
        scores: ``[T, E]`` float, finite, in masked tokens too; the larger the better.
        mask: ``[T]`` integers or bool; tokens with a value other than 0 go nowhere, and the others are assigned as if
            they were alone.

    Returns:
        The expert of each token, ``[T]`` int64, -1 for a masked one.

    Raises:
        ValueError: ``scores`` is not ``[T, E]``, or on CPU not finite.  TypeError: it is not float.
    Gradients: none.  Host sync: none.  Deterministic: yes.
    Cost: about 100 small kernels that pass over the scores, and 6 sorts of T priorities. One op to a compiler,
    ``torch.ops.moeops_gates.balanced_assignment``.
    Source: BASE layers, arXiv:2103.16716, has an auction; Sinkhorn prices: S-BASE, arXiv:2202.01169, section 3.

    Example:
        >>> balanced_assignment(torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])).tolist()
        [0, 0, 1, 1]
    """
    if not torch.compiler.is_compiling():
        _checks.check_tensor("balanced_assignment", "scores", scores, 2)
        _checks.check_float("balanced_assignment", "scores", scores)
        if mask is not None:
            _checks.check_tensor("balanced_assignment", "mask", mask, 1)
            _checks.check_size(
                "balanced_assignment", "mask", mask, 0, scores.shape[0], "one per token"
            )
    return torch.ops.moeops_gates.balanced_assignment(scores, mask)


# One node for a compiler: written out, the steps take Inductor a minute, and its other rounding other choices. In a
# namespace of its own, because torch.ops.moeops holds what has native kernels.
@torch.library.custom_op(
    "moeops_gates::balanced_assignment",
    mutates_args=(),
    schema="(Tensor scores, Tensor? mask=None) -> Tensor",
)
def _balanced_assignment(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return scores.new_empty(0, dtype=torch.int64)
    if scores.device.type == "cpu" and not bool(scores.isfinite().all()):
        raise ValueError(
            "balanced_assignment: scores must be finite, got NaN or infinity. Check the tokens and the router."
        )
    # What all experts' scores of a token have in common does not matter; the mean size of the rest is the unit.
    s = scores.to(_checks.accumulate_dtype(scores.dtype))
    s = s - s.mean(-1, keepdim=True)
    live: Any = num_tokens
    if mask is None:
        s = s / (s.abs().mean() + TINY)
    else:
        live = num_unmasked(s, mask)  # a tensor: the host does not know it
        s = s / (hide_masked(s, mask).abs().sum() / (live * num_experts).clamp_min(1) + TINY)
    prices = _sinkhorn_prices(s, live, mask)

    smallest = live // num_experts
    order = torch.argsort(prices, descending=True, stable=True)
    place = torch.argsort(order)  # [E], 0 for the highest price
    room = smallest + (place < live % num_experts).to(torch.int64)  # [E]
    assigned = _fill_experts(s - prices, room, mask)
    for _ in range(_SWAPS):
        assigned = _swap_pairs(s, assigned, smallest, mask)
    return assigned


@_balanced_assignment.register_fake
def _balanced_assignment_fake(scores, mask=None):
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


def _sinkhorn_prices(s: Tensor, num_tokens: Any, mask: Tensor | None) -> Tensor:
    """Prices ``[E]`` at which every expert is the first choice of about ``T / E`` of the unmasked tokens."""
    num_experts = s.shape[1]
    if mask is not None:
        num_tokens = num_tokens.clamp_min(1).to(s.dtype)
    prices = s.new_zeros(num_experts)
    ratio = _LAST_TEMPERATURE / _FIRST_TEMPERATURE
    for i in range(_PRICE_ITERATIONS):
        temperature = _FIRST_TEMPERATURE * ratio ** (i / (_PRICE_ITERATIONS - 1))
        demand = hide_masked(torch.softmax((s - prices) / temperature, dim=-1), mask).sum(0)  # [E]
        # The small number keeps the price of an expert that nobody wants finite.
        prices = prices + temperature * (demand * (num_experts / num_tokens) + 1e-6).log()
    return prices - prices.mean()


def _fill_experts(values: Tensor, room: Tensor, mask: Tensor | None) -> Tensor:
    """Rounds of requests: ``values [T, E]``, ``room [E]`` that adds up to the unmasked tokens."""
    num_experts = values.shape[1]
    experts = torch.arange(num_experts, device=values.device)
    # Alike tokens, of which there are many below the first attention, must not all ask for the same expert: they spread
    # over those that are as good within a temperature. The golden ratio's multiples are as even as a fixed sequence is.
    number = torch.arange(values.shape[0], device=values.device)
    if mask is not None:
        number = (mask == 0).to(torch.int64).cumsum(0) - 1
    spread = number.to(torch.float64) * _GOLDEN_RATIO % 1
    spread = spread.to(values.dtype)[:, None]  # [T, 1]
    keep = _keep_with_placeholders(room, values) if mask is None else _keep_by_position(room, mask)
    assigned = torch.full_like(values[:, 0], -1, dtype=torch.int64)  # [T]
    for _ in range(_ROUNDS):
        has_room = count_tokens(assigned, num_experts) < room  # [E]
        offers = torch.where(has_room, values, _CLOSED)
        shares = torch.softmax(offers / _LAST_TEMPERATURE, dim=-1).cumsum(-1)  # [T, E]
        wanted = (shares <= spread * shares[:, -1:]).to(torch.int64).sum(-1, keepdim=True)  # [T, 1]
        others = torch.where(experts == wanted, _CLOSED, offers).amax(-1)
        regret = offers.gather(1, wanted)[:, 0] - others
        held = assigned >= 0
        # Those who hold a place keep it, so that every round ends with fewer tokens without one.
        priority = torch.where(held, math.inf, regret)
        assigned = keep(torch.where(held, assigned, wanted[:, 0]), priority)
    # The n-th token without an expert takes the n-th free place.
    free = (room - count_tokens(assigned, num_experts)).cumsum(0)  # [E]
    left = assigned < 0 if mask is None else (assigned < 0) & (mask == 0)
    nth = left.to(torch.int64).cumsum(0) - 1
    gap = (nth[:, None] >= free).to(torch.int64).sum(-1)
    return torch.where(left, gap, assigned)


def _keep_with_placeholders(room: Tensor, values: Tensor) -> Keep:
    """One capacity for all, ``ceil(T / E)``: a placeholder takes a place where the room is one less."""
    num_tokens, num_experts = values.shape
    largest = -(-num_tokens // num_experts)
    experts = torch.arange(num_experts, device=room.device)
    placeholders = torch.where(room < largest, experts, -1)
    always = torch.full_like(placeholders, math.inf, dtype=values.dtype)

    def keep(requests: Tensor, priority: Tensor) -> Tensor:
        requests = torch.cat((requests, placeholders))[:, None]
        priority = torch.cat((priority, always))[:, None]
        kept = limit_capacity(requests, num_experts, largest, priority=priority)
        return kept[:num_tokens, 0]

    return keep


def _keep_by_position(room: Tensor, mask: Tensor) -> Keep:
    """Each expert's own room, which the host does not know with a mask."""

    def keep(requests: Tensor, priority: Tensor) -> Tensor:
        requests = drop_masked(requests[:, None], mask)
        places = priority_positions(requests, priority[:, None], room.shape[0])
        return torch.where(places < room[requests.clamp_min(0)], requests, -1)[:, 0]

    return keep


def _swap_pairs(s: Tensor, assigned: Tensor, smallest: Any, mask: Tensor | None) -> Tensor:
    """Let experts that are each other's best partner exchange one token each, where the total gains by it.

    An expert with ``smallest`` tokens has a gap, if others have one more: it may give the gap for a token, and the gap
    is worth nothing anywhere.
    """
    num_tokens, num_experts = s.shape
    experts = torch.arange(num_experts, device=s.device)
    tokens = torch.arange(num_tokens, device=s.device)
    gap = count_tokens(assigned, num_experts) <= smallest  # [E]
    # What the total gains when a token goes there, and the most that a token of one expert gains at another.
    own = assigned
    if mask is not None:
        own = assigned.clamp_min(0)
    moves = s - s.gather(1, own[:, None])  # [T, E]
    if mask is not None:
        moves = moves.masked_fill((mask != 0)[:, None], _CLOSED)
    closed = s.new_full((num_experts, num_experts), _CLOSED)
    gains = closed.scatter_reduce(0, own[:, None].expand_as(moves), moves, "amax")
    gains = torch.where(gap[:, None] & ~gap, gains.clamp_min(0), gains)
    gains = torch.where(experts[:, None] == experts, _CLOSED, gains + gains.t())
    gain, partner = gains.max(-1)  # [E]
    swaps = (partner[partner] == experts) & (gain > 0)
    # Who goes: the token of each expert that gains most at the partner, the first one of equals.
    move = moves.gather(1, partner[own][:, None])[:, 0]  # [T]
    best = closed[0].scatter_reduce(0, own, move, "amax")  # [E]
    candidates = torch.where(move == best[own], tokens, num_tokens)
    if mask is not None:
        candidates = candidates.masked_fill(mask != 0, num_tokens)
    first = torch.full_like(experts, num_tokens).scatter_reduce(0, own, candidates, "amin")
    swaps = swaps & ~(gap & ~gap[partner] & (best < 0))  # here the gap goes
    goes = swaps[own] & (first[own] == tokens)
    return torch.where(goes, partner[own], assigned)
