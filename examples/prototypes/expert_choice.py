"""Expert choice: experts take their best tokens. T tokens, E experts, C tokens per expert."""

from __future__ import annotations

import torch
from numba import cuda, float64, int32
from torch import Tensor

from moeops.gates.base import BaseGate
from moeops.gates.functional import RouterLinear, expert_capacity, router_logits
from moeops.numba import block_kernel, row_kernel, widen
from moeops.types import Routing

THREADS = 512
HALVINGS = 24


@block_kernel(
    "example::expert_choice",
    "scores[E, T], capacity: int -> weights[E, capacity]: float, tokens[E, capacity]: int64",
    grid=lambda E: E,
    threads=lambda T: THREADS if T > 64 else 32,
    require=("capacity <= T",),
)
def expert_choice(scores, capacity, weights, tokens):
    """Take the ``capacity`` tokens with the largest scores, best first, ties by lower token. Block -> expert.

    A mark that ``capacity`` scores reach is found by halving, each step a count over the row; a scan over the threads
    in shared memory, for each stretch of tokens, gives those that reach it their places, earlier tokens first among
    equals; a sorting network puts them in order. Reference: ``expert_choice_reference``.
    """
    lows = cuda.shared.array(THREADS, float64)
    highs = cuda.shared.array(THREADS, float64)
    places = cuda.shared.array(THREADS, int32)
    expert = cuda.blockIdx.x
    thread = cuda.threadIdx.x
    threads = cuda.blockDim.x
    num_tokens = scores.shape[1]
    if capacity == 0:
        return
    for c in range(thread, capacity, threads):  # NaN reaches no mark and would leave a hole
        weights[expert, c] = 0.0
        tokens[expert, c] = 0

    low = 1.0 * widen(scores[expert, 0])  # float64, whatever the type
    high = low
    for t in range(thread, num_tokens, threads):
        value = 1.0 * widen(scores[expert, t])
        low = min(low, value)
        high = max(high, value)
    lows[thread] = -low
    highs[thread] = high
    low = -block_max(lows)
    high = block_max(highs)

    # At least `capacity` scores are above `low`, fewer above `high`: halve what lies between.
    mark = low
    above = count_above(scores, expert, low)
    if above >= capacity:
        for _ in range(HALVINGS):
            if above != capacity:
                middle = 0.5 * low + 0.5 * high
                mark = middle
                above = count_above(scores, expert, middle)
                if above > capacity:
                    low = middle
                else:
                    high = middle
        # Scores that are this close are equal, or nearly so: from here on one after the other.
        if above != capacity:
            mark = high
            above = count_above(scores, expert, mark)
            reached = 0
            while reached < capacity:
                best = low
                for t in range(thread, num_tokens, threads):
                    value = 1.0 * widen(scores[expert, t])
                    if value > best and (value < mark or (reached == 0 and value == mark)):
                        best = value
                highs[thread] = best
                mark = block_max(highs)
                above = count_above(scores, expert, mark)
                reached = above + count_equal(scores, expert, mark)
                if mark <= low:  # NaN among them
                    break

    num_above = 0
    num_equal = 0
    for first in range(0, num_tokens, threads):
        t = first + thread
        kind = 0  # both counts in one number
        if t < num_tokens:
            value = 1.0 * widen(scores[expert, t])
            if value > mark:
                kind = 1
            elif value == mark:
                kind = 65536
        places[thread] = kind
        cuda.syncthreads()
        step = 1
        while step < threads:
            before = places[thread - step] if thread >= step else 0
            cuda.syncthreads()
            places[thread] += before
            cuda.syncthreads()
            step *= 2
        place = num_above + places[thread] % 65536 - 1
        if kind > 1:
            place = above + num_equal + places[thread] // 65536 - 1
        if kind > 0 and place < capacity:
            weights[expert, place] = widen(scores[expert, t])
            tokens[expert, place] = t
        num_above += places[threads - 1] % 65536
        num_equal += places[threads - 1] // 65536
        cuda.syncthreads()

    # A bitonic network whose comparisons all point the same way: what lies past the last entry may be left out.
    size = 2
    while size < 2 * capacity:
        half = size // 2
        step = half
        while step > 0:
            for pair in range(thread, (capacity + size - 1) // size * half, threads):
                left = pair // step * 2 * step + pair % step
                right = left + step
                if step == half:
                    right = pair // step * 2 * step + size - 1 - pair % step
                if right < capacity and worse(weights[expert], tokens[expert], left, right):
                    weight = weights[expert, left]
                    weights[expert, left] = weights[expert, right]
                    weights[expert, right] = weight
                    token = tokens[expert, left]
                    tokens[expert, left] = tokens[expert, right]
                    tokens[expert, right] = token
            cuda.syncthreads()
            step //= 2
        size *= 2


def block_max(values):
    """The largest of the values in shared memory, one of each thread."""
    thread = cuda.threadIdx.x
    cuda.syncthreads()
    step = cuda.blockDim.x // 2
    while step > 0:
        if thread < step:
            values[thread] = max(values[thread], values[thread + step])
        cuda.syncthreads()
        step //= 2
    best = values[0]
    cuda.syncthreads()
    return best


def count_above(scores, expert, mark):
    """How many scores of an expert are above the mark, counted by all threads of the block."""
    count = 0
    for first in range(0, scores.shape[1], cuda.blockDim.x):
        t = first + cuda.threadIdx.x
        above = 0
        if t < scores.shape[1] and widen(scores[expert, t]) > mark:
            above = 1
        count += cuda.syncthreads_count(above)
    return count


def count_equal(scores, expert, mark):
    """How many scores of an expert are the mark."""
    count = 0
    for first in range(0, scores.shape[1], cuda.blockDim.x):
        t = first + cuda.threadIdx.x
        equal = 0
        if t < scores.shape[1] and widen(scores[expert, t]) == mark:
            equal = 1
        count += cuda.syncthreads_count(equal)
    return count


@row_kernel(
    "example::expert_choice_by_row",
    "scores[E, T], capacity: int -> weights[E, capacity]: float, tokens[E, capacity]: int64",
    require=("capacity <= T",),
    finite=("scores",),
)
def expert_choice_by_row(scores, capacity, weights, tokens):
    """The same as a rule: a row is an expert."""
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


@expert_choice.cpu
def _expert_choice_cpu(scores, capacity):
    return expert_choice_by_row(scores, capacity)


@expert_choice.gradient(saves=("scores", "tokens"))
def _expert_choice_gradient(grads, inputs, outputs):
    scores = inputs["scores"]
    grad = grads["weights"].to(scores.dtype)
    return {"scores": torch.zeros_like(scores).scatter(1, outputs["tokens"], grad)}


def expert_choice_reference(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: scores ``[E, T]`` to weights and tokens ``[E, C]``."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    tokens = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :capacity]
    return scores.gather(1, tokens), tokens


class BlockExpertChoiceGate(BaseGate):
    """Each expert takes its ``C`` best tokens by ``softmax(W x)`` over the experts; a token has 0 to E experts.

    Args:
        d_model: ``D``.
        num_expert: experts on this rank.
        world_size: ranks that hold different experts.
        top_k: average number of experts per token; ``C = ceil(top_k * T / E)``, at most ``T``.
        gate_bias: give the router a bias.
    Source: Zhou et al. 2022, arXiv:2202.09368.

    Example:
        >>> routing = BlockExpertChoiceGate(8, 4, 1, top_k=2)(torch.randn(6, 8))
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
        self.gate = RouterLinear(d_model, self.tot_expert, bias=gate_bias)

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
