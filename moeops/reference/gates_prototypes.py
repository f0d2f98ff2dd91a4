"""The truth for the routing rules of ``moeops.numba.gates`` that no op has: slow, readable, right in float64.

T tokens, K slots per token, E experts.
"""

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


def score_weights(score: str, logits: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
    """The weights ``[T, K]`` that a routing rule with this score must give; see ``moeops.numba.scores``."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    chosen = ids.clamp_min(0).long()
    if score == "relu":
        values = torch.relu(z).gather(1, chosen)
    elif score.startswith("softmax"):
        values = torch.softmax(z, dim=-1).gather(1, chosen)
    else:
        values = torch.sigmoid(z).gather(1, chosen)
    values = torch.where(ids >= 0, values, 0)
    if score.endswith("_topk"):
        values = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    return values * scale
