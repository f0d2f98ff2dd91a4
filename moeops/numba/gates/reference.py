"""The truth for the gallery's ops that ``moeops.reference`` does not hold: slow, readable, right in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_p(
    logits: Tensor, top_k: int, mass: float = 0.8, margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See ``moeops.numba.gates.top_p``; token by token, differentiable by autograd."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    ids = torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = z.gather(1, ids)
    values = chosen.detach()
    kept, rows = ids.clone(), []
    for t in range(z.shape[0]):
        q = torch.softmax(values[t], dim=-1)
        taken = [k for k in range(top_k) if k == 0 or float(q[:k].sum()) < mass]
        floor = float(values[t, taken[-1]]) - margin
        count = len(taken) + sum(float(values[t, k]) > floor for k in range(len(taken), top_k))
        kept[t, count:] = -1
        weights = torch.softmax(chosen[t, :count], dim=-1)
        rows.append(torch.cat((weights, weights.new_zeros(top_k - count))))
    return (torch.stack(rows) if rows else chosen), kept


def hash_route(
    token_ids: Tensor, num_experts: int, top_k: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """See ``moeops.numba.gates.hash_route``."""
    mask = (1 << 31) - 1

    def scramble(key: int) -> int:
        for _ in range(2):
            key = ((key ^ (key >> 16)) * 0x45D9F3B) & mask
        return key ^ (key >> 16)

    ids = torch.empty((token_ids.numel(), top_k), dtype=torch.int64)
    for t, token in enumerate(token_ids.tolist()):
        key = scramble((token & mask) ^ scramble(seed & mask))
        step = 1 + scramble(key) % num_experts
        while math.gcd(step, num_experts) != 1:
            step += 1
        ids[t] = torch.tensor([(key + k * step) % num_experts for k in range(top_k)])
    weights = torch.full((token_ids.numel(), top_k), 1.0 / top_k)
    return weights.to(token_ids.device), ids.to(token_ids.device)


def expert_choice(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """See ``moeops.numba.gates.expert_choice``: scores ``[E, T]`` to weights and tokens ``[E, C]``."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    tokens = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :capacity]
    return scores.gather(1, tokens), tokens
