"""Gates of HetuMoE, BASE layers, EvoMoE, Tutel and DeepSpeed-MoE, token by token, and the exact balanced assignment.

Logits ``[T, E]`` in float64 in; ids, weights and loss out, differentiable by autograd. T tokens, K experts per token,
E experts, C capacity in rows. Loops and host copies are welcome here. Noise is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def _softmax(z: Tensor) -> Tensor:
    powers = torch.exp(z - z.max())
    return powers / powers.sum()


def _best(z: Tensor, k: int) -> list[int]:
    """The k largest, best first, ties by lower id."""
    values = z.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def _balance(probs: list[Tensor], chosen: list[list[int]], num_experts: int) -> Tensor:
    """``E * sum_e f_e * P_e`` with ``f_e`` the entries of ``chosen`` that name ``e``, divided by ``T``."""
    total = probs[0].new_zeros(())
    for e in range(num_experts):
        share = sum(row.count(e) for row in chosen) / len(chosen)
        total = total + num_experts * share * sum(p[e] for p in probs) / len(probs)
    return total


def _keep(ids: Tensor, order: Iterable[tuple[int, int]], capacity: int) -> Tensor:
    """Every expert takes the first ``capacity`` pairs ``(token, choice)`` of ``order``."""
    out = ids.clone()
    taken: dict[int, int] = {}
    for t, k in order:
        expert = int(ids[t, k])
        if expert < 0:
            continue
        taken[expert] = taken.get(expert, 0) + 1
        if taken[expert] > capacity:
            out[t, k] = -1
    return out


def by_choice(num_tokens: int, top_k: int) -> list[tuple[int, int]]:
    """First choices in token order, then second ones."""
    return [(t, k) for k in range(top_k) for t in range(num_tokens)]


def ktop1_gate(
    logits: Tensor, top_k: int, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """HetuMoE's KTop1Gate: top 1 in each of K prototypes."""
    num_tokens, num_experts = logits.shape
    size = num_experts // top_k
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    columns, loss = [], logits.new_zeros(())
    for k in range(top_k):
        probs = [_softmax(logits[t, k * size : (k + 1) * size]) for t in range(num_tokens)]
        chosen = [_best(p, 1)[0] for p in probs]
        ids[:, k] = torch.tensor(chosen) + k * size
        columns.append(torch.stack([p[e] for p, e in zip(probs, chosen, strict=True)]))
        loss = loss + _balance(probs, [[e] for e in chosen], size)
    if capacity is not None:
        ids = _keep(ids, by_choice(num_tokens, top_k), capacity)
    return ids, torch.stack(columns, dim=1), loss


def sam_gate(
    logits: Tensor, top_k: int, num_groups: int, alignment: float = 1.0, compat: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """HetuMoE's SAMGate; ``compat`` takes the group of its kernels: ``G`` experts from ``g * G`` on."""
    num_tokens, num_experts = logits.shape
    summed = num_experts // num_groups
    width = num_groups if compat else summed
    all_probs, ids, weights, aligned = [], [], [], logits.new_zeros(())
    for t in range(num_tokens):
        p = _softmax(logits[t])
        sums = torch.stack([p[g * summed : (g + 1) * summed].sum() for g in range(num_groups)])
        group = _best(sums, 1)[0]
        begin, end = group * width, (group + 1) * width
        chosen = [begin + e for e in _best(p[begin:end], top_k)]
        for e in range(num_experts):
            if not begin <= e < end and p[e] > p[chosen[-1]]:
                aligned = aligned + p[e] - p[chosen[-1]]
        all_probs.append(p)
        ids.append(chosen)
        weights.append(torch.stack([p[e] for e in chosen]))
    loss = _balance(all_probs, ids, num_experts)
    loss = loss + alignment * (aligned if compat else aligned / num_tokens)
    return torch.tensor(ids), torch.stack(weights), loss


def dense_to_sparse_gate(
    logits: Tensor, noise: Tensor | None, temperature: float, top_k: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """EvoMoE's gate: Gumbel-softmax, what is above the threshold, at least one expert and at most K."""
    num_tokens, num_experts = logits.shape
    ids = torch.full((num_tokens, top_k), -1)
    weights, means = [], logits.new_zeros(num_experts)
    for t in range(num_tokens):
        z = logits[t] if noise is None else logits[t] + noise[t]
        p = _softmax(z / temperature)
        means = means + p / num_tokens
        chosen = _best(p, top_k)
        for k, e in enumerate(chosen):
            if k == 0 or p[e] >= threshold:
                ids[t, k] = e
        weights.append(torch.stack([p[e] * (ids[t, k] >= 0) for k, e in enumerate(chosen)]))
    return ids, torch.stack(weights), num_experts * (means**2).sum()


def tutel_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Tutel's formula for a factor above 0."""
    return top_k * int(factor * math.ceil(num_tokens / num_experts))


def tutel_gate(
    clean: Tensor,
    noisy: Tensor,
    top_k: int,
    factor: float,
    *,
    prioritized: bool = False,
    normalize: bool = True,
    gate_noise: float = 0.0,
    gshard: bool = True,
    alignment: int = 1,
    compat: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tutel's top gate, with the capacity from the measured load where the factor is 0 or less, as there."""
    num_tokens, num_experts = clean.shape
    probs = [_softmax(z) for z in noisy]
    ids = torch.tensor([_best(z, top_k) for z in noisy])
    weights = []
    for p, row in zip(probs, ids.tolist(), strict=True):
        w = torch.stack([p[e] for e in row])
        weights.append(w / w.sum() if top_k > 1 and normalize else w)
    if gshard:
        loss = _balance(probs, [row[:1] for row in ids.tolist()], num_experts)
    else:
        loss = _load_importance(clean, noisy, ids, gate_noise, compat)
    tokens = list(range(num_tokens))
    if prioritized:
        tokens.sort(key=lambda t: (-float(probs[t].detach().max()), t))
    largest = max(int((ids == e).sum()) for e in range(num_experts))
    capacity = largest if factor <= 0 else tutel_capacity(num_tokens, num_experts, top_k, factor)
    if factor < 0:
        capacity = min(capacity, tutel_capacity(num_tokens, num_experts, top_k, -factor))
    capacity = math.ceil(capacity / alignment) * alignment
    order = [(t, k) for k in range(top_k) for t in tokens]
    return _keep(ids, order, capacity), torch.stack(weights), loss


def _load_importance(
    clean: Tensor, noisy: Tensor, ids: Tensor, gate_noise: float, compat: bool
) -> Tensor:
    num_tokens, num_experts = clean.shape
    sigma = gate_noise / num_experts
    probs = [_softmax(z) for z in clean]
    load = [clean.new_zeros(()) for _ in range(num_experts)]
    for t in range(num_tokens):
        mark = noisy[t, ids[t, -1]]
        for e in range(num_experts):
            value = probs[t][e] if compat else clean[t, e]
            load[e] = load[e] + 0.5 * (1 + torch.erf((value - mark) / sigma / math.sqrt(2)))

    def cv2(values: Tensor) -> Tensor:
        mean = values.mean()
        if compat:
            return values.var() / (mean**2 + 1e-10)
        return ((values - mean) ** 2).mean() / mean**2

    return (cv2(torch.stack(probs).sum(0)) + cv2(torch.stack(load))) / 2


def deepspeed_capacity(
    num_tokens: int, num_experts: int, top_k: int, factor: float, least: int
) -> int:
    """DeepSpeed's formula."""
    return max(math.ceil(num_tokens / num_experts * factor * top_k), least)


def deepspeed_gate(
    logits: Tensor,
    top_k: int,
    capacity: int | None,
    *,
    ids: Tensor | None = None,
    draws: Tensor | None = None,
    drop_policy: str = "probs",
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSpeed's gates; ``ids`` are choices that were sampled, ``draws [T]`` the numbers of random token selection."""
    num_tokens, num_experts = logits.shape
    probs = [_softmax(z) for z in logits]
    if ids is None:
        ids = torch.tensor([_best(z, top_k) for z in logits])
    if used is not None:
        ids = torch.where(used[:, None] == 0, -1, ids)
    rows = [[e for e in row if e >= 0] for row in ids.tolist()]
    if top_k > 2:
        loss = _balance(probs, rows, num_experts) / top_k
    else:
        loss = _balance(probs, [row[:1] for row in rows], num_experts)
    kept = ids
    if capacity is not None:
        order = by_choice(num_tokens, top_k)
        if draws is not None:
            order.sort(key=lambda pair: -float(draws[pair[0]]))
        elif top_k > 2:
            order.sort()
            if drop_policy == "probs":
                order.sort(key=lambda pair: -float(probs[pair[0]].detach()[ids[pair]]))
        kept = _keep(ids, order, capacity)
    weights = []
    for t in range(num_tokens):
        w = torch.stack([probs[t][e] for e in ids[t].clamp_min(0)])
        if top_k > 1:
            live = (kept[t] >= 0).to(w.dtype)
            w = w * live / ((w * live).sum() + float(live.sum() == 0))
        weights.append(w)
    return kept, torch.stack(weights), loss


def balanced_assignment(scores: Tensor) -> Tensor:
    """The best assignment with ``T // E`` or ``T // E + 1`` tokens per expert: the Hungarian method."""
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return torch.zeros(0, dtype=torch.int64)
    largest = math.ceil(num_tokens / num_experts)
    places = [(e, n) for e in range(num_experts) for n in range(largest)]
    # A stand-in for each empty place, of which an expert may have one, its last.
    forbidden = 1e6 * (1 + float(scores.abs().max()))
    cost = [[-float(scores[t, e]) for e, _ in places] for t in range(num_tokens)]
    for _ in range(len(places) - num_tokens):
        cost.append([0.0 if n == largest - 1 else forbidden for _, n in places])
    rows = _hungarian(cost)
    ids = torch.zeros(num_tokens, dtype=torch.int64)
    for place, row in enumerate(rows):
        if row < num_tokens:
            ids[row] = places[place][0]
    return ids


def _hungarian(cost: list[list[float]]) -> list[int]:
    """The row of each column in the cheapest perfect matching of a square matrix, by shortest augmenting paths."""
    n = len(cost)
    row_price, column_price = [0.0] * (n + 1), [0.0] * (n + 1)
    match = [n] * (n + 1)  # of columns; column n is where a path starts
    for row in range(n):
        match[n] = row
        column = n
        slack, came_from, done = [math.inf] * n, [n] * n, [False] * (n + 1)
        while match[column] != n:
            done[column] = True
            current, step, nearest = match[column], math.inf, -1
            for j in range(n):
                if done[j]:
                    continue
                reduced = cost[current][j] - row_price[current] - column_price[j]
                if reduced < slack[j]:
                    slack[j], came_from[j] = reduced, column
                if slack[j] < step:
                    step, nearest = slack[j], j
            for j in range(n + 1):
                if done[j]:
                    row_price[match[j]] += step
                    column_price[j] -= step
                elif j < n:
                    slack[j] -= step
            column = nearest
        while column != n:
            match[column] = match[came_from[column]]
            column = came_from[column]
    return match[:n]
