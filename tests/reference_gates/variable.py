"""Gates in which experts choose, slots mix, or the number of experts varies, number by number.

Logits ``[T, E]`` in float64 in; ids, weights and loss out, differentiable by autograd. T tokens, K slots per token,
E experts, S slots per expert. Loops and host copies are welcome here.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def _softmax(z: Tensor) -> Tensor:
    powers = torch.exp(z - z.max())
    return powers / powers.sum()


def _best(z: Tensor, k: int) -> list[int]:
    """The k largest, best first, ties by lower index."""
    values = z.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def _empty(T: int, K: int, like: Tensor) -> tuple[list[list[int]], list[list[Tensor]]]:
    return [[-1] * K for _ in range(T)], [[like.new_zeros(())] * K for _ in range(T)]


def _stack(ids: list[list[int]], weights: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(ids), torch.stack([torch.stack(row) for row in weights])


def expert_choice(logits: Tensor, top_k: int, capacity: float) -> tuple[Tensor, Tensor, int]:
    """Every expert takes its best tokens: ids and weights ``[T, E]``, and the number of pairs."""
    T, E = logits.shape
    probs = [_softmax(z) for z in logits]
    rows = min(T, math.ceil(Fraction(str(capacity)) * T * top_k / E))
    ids, weights = _empty(T, E, logits)
    for e in range(E):
        for t in _best(torch.stack([p[e] for p in probs]), rows):
            ids[t][e] = e
            weights[t][e] = probs[t][e]
    return *_stack(ids, weights), E * rows


def soft_moe(
    x: Tensor, phi: Tensor, scale: Tensor, sequence_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights of tokens in slots and of slots in tokens, both ``[T, E * S]``."""
    T, num_slots = x.shape[0], phi.shape[1]
    dispatch, combine = [], []
    length = sequence_length or T
    for begin in range(0, T, length):
        z = torch.zeros(min(length, T - begin), num_slots, dtype=x.dtype)
        for t in range(z.shape[0]):
            for s in range(num_slots):
                token, slot = x[begin + t], phi[:, s]
                token = token / (token.square().sum().sqrt() + 1e-6)
                slot = slot / (slot.square().sum().sqrt() + 1e-6)
                z[t, s] = scale * (token * slot).sum()
        dispatch.append(torch.stack([_softmax(column) for column in z.t()]).t())
        combine.append(torch.stack([_softmax(row) for row in z]))
    return torch.cat(dispatch), torch.cat(combine)


def soft_mixture(
    x: Tensor, dispatch: Tensor, combine: Tensor, experts, tokens_per_group=None
) -> Tensor:
    """Run experts on their slots, group by group: ``[T, D]``."""
    T, slots = x.shape[0], dispatch.shape[1] // len(experts)
    y = []
    length = tokens_per_group or T
    for begin in range(0, T, length):
        rows = slice(begin, begin + length)
        inputs = dispatch[rows].t() @ x[rows]
        outputs = [expert(inputs[e * slots : (e + 1) * slots]) for e, expert in enumerate(experts)]
        y.append(combine[rows] @ torch.cat(outputs))
    return torch.cat(y)


def _limit(ids: list[list[int]], weights, row_budget: float | None, before) -> int:
    """Empty the slots ``(t, k)`` that come last by ``before`` and have no row; return how many."""
    T, K = len(ids), len(ids[0])
    if row_budget is None or row_budget >= K:
        return 0
    filled = sorted(((t, k) for t in range(T) for k in range(K) if ids[t][k] >= 0), key=before)
    lost = filled[math.ceil(Fraction(str(row_budget)) * T) :]
    for t, k in lost:
        ids[t][k] = -1
        weights[t][k] = torch.zeros_like(weights[t][k])
    return len(lost)


def threshold(
    logits: Tensor,
    top_k: int,
    *,
    top_p: float,
    min_prob: float = 0.0,
    renormalize: bool = False,
    balance: bool = False,
    dynamic: float = 0.0,
    row_budget: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Best experts up to a mass: ids and weights ``[T, K]``, the loss, and the slots lost to the budget."""
    T, E = logits.shape
    probs = [_softmax(z) for z in logits]
    ids, weights = _empty(T, top_k, logits)
    for t, p in enumerate(probs):
        mass, chosen = 0.0, []
        for k, e in enumerate(_best(p, top_k)):
            if k > 0 and (mass >= top_p or p[e] < min_prob):
                break
            mass += float(p[e].detach())
            chosen.append(e)
        total = sum(p[e] for e in chosen) if renormalize else 1
        for k, e in enumerate(chosen):
            ids[t][k] = e
            weights[t][k] = p[e] / total
    loss = logits.new_zeros(())
    pairs = sum(e >= 0 for row in ids for e in row)
    for e in range(E):
        if balance:
            share = sum(row.count(e) for row in ids) / pairs
            loss = loss + E * share * sum(p[e] for p in probs) / T
        loss = loss - dynamic * sum(p[e] * torch.log(p[e]) for p in probs) / T
    order = {(t, k): float(probs[t][ids[t][k]].detach()) for t in range(T) for k in range(top_k)}
    lost = _limit(ids, weights, row_budget, lambda slot: (slot[1], -order[slot], slot[0]))
    return *_stack(ids, weights), loss, lost


def remoe(
    logits: Tensor,
    top_k: int,
    *,
    coefficient: float,
    balance: bool = True,
    max_k: int | None = None,
    row_budget: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """ReLU routing: ids and weights ``[T, max_k]``, the loss, and the slots lost to the budget."""
    T, E = logits.shape
    slots = E if max_k is None else max_k
    ids, weights = _empty(T, slots, logits)
    loss = logits.new_zeros(())
    for e in range(E):
        share = sum(float(z[e].detach()) > 0 for z in logits) / T
        factor = E / top_k * share if balance else 1.0
        loss = loss + coefficient * factor * sum(z[e].clamp(min=0) for z in logits) / T
    for t, z in enumerate(logits):
        order = range(E) if slots == E else _best(z, slots)
        for k, e in enumerate(order):
            if float(z[e].detach()) > 0:
                ids[t][k] = e
                weights[t][k] = z[e]
    values = [[float(w.detach()) for w in row] for row in weights]
    lost = _limit(ids, weights, row_budget, lambda slot: (-values[slot[0]][slot[1]], slot))
    return *_stack(ids, weights), loss, lost


def llama4(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best logits, sigmoid for the inputs: ids and weights ``[T, K]``, and the balance loss."""
    T, E = logits.shape
    ids = [_best(z, top_k) for z in logits]
    scores = 1 / (1 + torch.exp(-logits))
    weights = torch.stack([scores[t][ids[t]] for t in range(T)])
    loss = logits.new_zeros(())
    for e in range(E):
        share = sum(row.count(e) for row in ids) / (T * top_k)
        loss = loss + E * share * sum(s[e] / s.sum() for s in scores) / T
    return torch.tensor(ids), weights, loss
