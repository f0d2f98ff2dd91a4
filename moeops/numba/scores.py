"""Score functions a routing rule can name: what its weights are, and so what their gradient is.

``softmax`` and ``sigmoid`` are the chosen scores as they are, ``softmax_topk`` and ``sigmoid_topk`` divide them by
their sum over the chosen (for softmax, the softmax over the chosen logits), ``relu`` is ``max(z, 0)``. A slot with id
-1 has weight 0 and no gradient. T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks

SCORES = ("softmax", "sigmoid", "softmax_topk", "sigmoid_topk", "relu")


def logits_gradient(
    score: str, grad_weights: Tensor, logits: Tensor, ids: Tensor, scale: float = 1.0
) -> Tensor:
    """The gradient of such weights in closed form: plain PyTorch, so that it compiles and differentiates again.

    Args:
        score: one of ``SCORES``.
        grad_weights: ``[T, K]``.
        logits: ``[T, E]``.
        ids: ``[T, K]`` integers in ``[-1, E)``.
        scale: factor on all weights.

    Returns:
        ``[T, E]``, the type of ``logits``.
    """
    z = logits.to(_checks.accumulate_dtype(logits.dtype))
    live = ids >= 0
    chosen = ids.clamp_min(0).long()
    grad = torch.where(live, grad_weights.to(z.dtype) * scale, 0)  # [T, K]
    if score.endswith("_topk"):
        grad = _normalised(score, grad, z.gather(1, chosen), live)
        return torch.zeros_like(z).scatter_add(1, chosen, grad).to(logits.dtype)
    spread = torch.zeros_like(z).scatter_add(1, chosen, grad)  # [T, E]
    if score == "softmax":
        probs = torch.softmax(z, dim=-1)
        out = probs * (spread - (spread * probs).sum(-1, keepdim=True))
    elif score == "sigmoid":
        probs = torch.sigmoid(z)
        out = spread * probs * (1 - probs)
    else:
        out = spread * (z > 0)
    return out.to(logits.dtype)


def _normalised(score: str, grad: Tensor, z: Tensor, live: Tensor) -> Tensor:
    """Gradient to the chosen logits of scores divided by their sum; all ``[T, K]``."""
    if score == "softmax_topk":
        # A row without a live slot has no finite logit; its weights are 0.
        z = torch.where(live.any(-1, keepdim=True), torch.where(live, z, float("-inf")), 0)
        share = torch.where(live, torch.softmax(z, dim=-1), 0)
        return share * (grad - (share * grad).sum(-1, keepdim=True))
    probs = torch.where(live, torch.sigmoid(z), 0)
    total = probs.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    share = probs / total
    return (grad - (share * grad).sum(-1, keepdim=True)) / total * probs * (1 - probs)


def check_score(op: str, score: object) -> None:
    """``score`` is a known name."""
    if score not in SCORES:
        raise ValueError(f"{op}: score must be one of {SCORES}, got {score!r}. Pick one of them.")


__all__: list[str] = ["SCORES", "logits_gradient"]
