"""The truth for the gates of FastMoE and FSMoE, token by token, in plain PyTorch.

Everything is float64 on the CPU and differentiable by autograd. ``logits`` are ``[T, E]``; what several ranks decide
together takes and returns a list with one entry per rank. T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best(values: Tensor, k: int) -> Tensor:
    """The k largest entries per row, best first, ties by lower id."""
    return torch.sort(values.detach(), dim=-1, descending=True, stable=True).indices[:, :k]


def softmax_at(logits: Tensor, ids: Tensor) -> Tensor:
    """Softmax over the logits at ``ids [T, K]``."""
    chosen = torch.exp(logits.gather(1, ids))
    return chosen / chosen.sum(-1, keepdim=True)


def queue(ids: list[Tensor], weights: list[Tensor] | None, policy: str) -> list[tuple]:
    """All pairs ``(rank, token, choice)`` in the order in which experts take them."""
    pairs = [
        (r, t, k)
        for r, rank in enumerate(ids)
        for t in range(rank.shape[0])
        for k in range(rank.shape[1])
    ]
    if policy == "position":
        return pairs
    if policy == "choice":
        return sorted(pairs, key=lambda p: (p[2], p[0], p[1]))
    assert weights is not None
    weights = [w.detach() for w in weights]
    if policy == "priority":
        return sorted(pairs, key=lambda p: -float(weights[p[0]][p[1], p[2]]))
    assert policy == "batch"
    return sorted(pairs, key=lambda p: (p[2], -float(weights[p[0]][p[1]].max())))


def keep(ids: list[Tensor], order: list[tuple], num_experts: int, capacity: int) -> list[Tensor]:
    """Walk the pairs in order; an expert that is full drops the pair."""
    ids = [rank.clone() for rank in ids]
    taken = [0] * num_experts
    for r, t, k in order:
        e = int(ids[r][t, k])
        if e < 0:
            continue
        if taken[e] == capacity:
            ids[r][t, k] = -1
        else:
            taken[e] += 1
    return ids


def balance_losses(probs: list[Tensor], ids: list[Tensor]) -> list[Tensor]:
    """Every rank's ``E * sum_e f_e * P_e``: the share of all ranks' choices times the rank's mean probability."""
    num_experts = probs[0].shape[1]
    choices = [int(e) for rank in ids for e in rank.reshape(-1)]
    losses = []
    for p in probs:
        loss = p.new_zeros(())
        for e in range(num_experts):
            share = choices.count(e) / max(1, len(choices))
            loss = loss + num_experts * share * p[:, e].sum() / max(1, p.shape[0])
        losses.append(loss)
    return losses


def softmax(logits: Tensor) -> Tensor:
    """Softmax over all experts."""
    return torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)


def kept_loss(logits: Tensor, kept_ids: Tensor) -> Tensor:
    """FastMoE's Switch loss: sums over all tokens, divided by the number of those that were kept."""
    num_experts = logits.shape[1]
    kept = [int(e) for e in kept_ids.reshape(-1) if e >= 0]
    if not kept:
        return logits.sum() * 0
    probs = softmax(logits)
    loss = logits.new_zeros(())
    for e in range(num_experts):
        loss = loss + num_experts * kept.count(e) / len(kept) * probs[:, e].sum() / len(kept)
    return loss


def gshard(
    logits: list[Tensor],
    noise: list[Tensor] | None,
    factor: float,
    *,
    policy: str = "choice",
    world_size: int = 1,
    per_owner: bool = False,
    compat: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Ids, weights and losses of GShard's gate on ranks that share the capacity.

    ``noise [T]`` is uniform, ``None`` for no random routing. With ``compat`` the limit comes before the noise, and is
    FastMoE's; ``per_owner`` names the limit of FastMoE's DCGate.
    """
    num_experts = logits[0].shape[1]
    ids = [best(z, 2) for z in logits]
    weights = [softmax_at(z, i) for z, i in zip(logits, ids, strict=True)]
    losses = [balance_losses([softmax(z)], [i[:, :1]])[0] for z, i in zip(logits, ids, strict=True)]
    tokens = sum(z.shape[0] for z in logits)
    if not compat:
        rows = math.ceil(round(factor * tokens * 2 / num_experts, 9))
    elif per_owner:
        rows = math.ceil(round(factor * tokens / world_size, 9))
    else:
        rows = math.ceil(round(factor * tokens, 9)) * 2 // num_experts
    if compat:
        losses = [loss / world_size**2 for loss in losses]

    def at_random(ids: list[Tensor]) -> list[Tensor]:
        out = [rank.clone() for rank in ids]
        for r, rank in enumerate(out):
            for t in range(rank.shape[0]):
                if noise is not None and 2 * weights[r][t, 1] < noise[r][t]:
                    rank[t, 1] = -1
        return out

    def limit(ids: list[Tensor]) -> list[Tensor]:
        return keep(ids, queue(ids, weights, policy), num_experts, rows)

    return at_random(limit(ids)) if compat else limit(at_random(ids)), weights, losses


def swipe(logits: list[Tensor], top_k: int) -> tuple[list[Tensor], list[Tensor]]:
    """Walk the tokens of all ranks, choice by choice; a pair without room moves to the first rank that has some."""
    world_size = len(logits)
    num_expert = logits[0].shape[1] // world_size
    ids = [best(z, top_k) for z in logits]
    pairs = sum(rank.numel() for rank in ids)
    room = [math.ceil(pairs / world_size)] * world_size
    for k in range(top_k):
        late = []
        for rank in ids:
            for t in range(rank.shape[0]):
                owner = int(rank[t, k]) // num_expert
                if room[owner] > 0:
                    room[owner] -= 1
                else:
                    late.append((rank, t))
        for rank, t in late:
            owner = next(r for r in range(world_size) if room[r] > 0)
            room[owner] -= 1
            rank[t, k] = owner * num_expert + k % num_expert
    return ids, [softmax_at(z, i) for z, i in zip(logits, ids, strict=True)]


def faster(
    logits: Tensor, top_k: int, inside: range, fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights and loss of the topology-aware gate; ``inside`` are the experts of this node."""
    T = logits.shape[0]
    ids = best(logits, top_k)
    loss = balance_losses([softmax(logits)], [ids[:, :1]])[0]
    quota = math.floor(round(fraction * T, 9))
    leaving = [t for t in range(T) if int(ids[t, 0]) not in inside]
    if len(leaving) >= quota:
        leaving.sort(key=lambda t: -float(logits[t, ids[t, 0]]))
        at_home = best(logits[:, inside.start : inside.stop], top_k) + inside.start
        for t in range(T):
            if t in leaving[:quota]:
                ids[t, 1:] = at_home[t, : top_k - 1]
            else:
                ids[t] = at_home[t]
    return ids, softmax_at(logits, ids), loss


def xmoe_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Tensor, log_scale: Tensor
) -> Tensor:
    """Scaled cosines, one by one."""
    h = x @ weight.t()
    h = h if bias is None else h + bias
    scale = torch.exp(torch.clamp(log_scale, max=math.log(100)))
    rows = []
    for token in h:
        cosines = [
            (token * v).sum() / (token.square().sum() * v.square().sum()).sqrt() for v in vectors
        ]
        rows.append(scale * torch.stack(cosines))
    return torch.stack(rows)


def scores(logits: Tensor, score: str) -> Tensor:
    """Softmax or sigmoid of every logit."""
    return softmax(logits) if score == "softmax" else 1 / (1 + torch.exp(-logits))
