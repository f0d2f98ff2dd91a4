"""Groups of tokens in a row. T tokens, G groups, L tokens per group, F features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_token_groups(t: Tensor, tokens_per_group: int | None, fill: float = 0.0) -> Tensor:
    """View ``[T, F]`` as ``[G, L, F]``, the last group filled up; ``None`` makes one group of all."""
    if tokens_per_group is None:
        return t.unsqueeze(0)
    num_groups = (t.shape[0] + tokens_per_group - 1) // tokens_per_group
    missing = num_groups * tokens_per_group - t.shape[0]
    return F.pad(t, (0, 0, 0, missing), value=fill).view(num_groups, tokens_per_group, t.shape[1])


def join_token_groups(t: Tensor, tokens_per_group: int | None, num_tokens: int) -> Tensor:
    """The inverse: ``[G, L, F]`` to ``[T, F]``, what was filled up cut off."""
    if tokens_per_group is None:
        return t.squeeze(0)
    return t.flatten(0, 1)[:num_tokens]
