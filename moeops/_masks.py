"""Tokens that are not there, such as padding. T tokens, K experts per token.

A mask is ``[T]``, integers or bool; a token with a value other than 0 is masked. ``None`` masks nothing, at no cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def drop_masked(topk_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Set the ids ``[T, K]`` of masked tokens to -1."""
    return topk_ids if mask is None else torch.where((mask != 0)[:, None], -1, topk_ids)


def hide_masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Set the rows of masked tokens to 0: ``[T, ...]``, which gets no gradient there."""
    if mask is None:
        return values
    return values.masked_fill((mask != 0).view(-1, *(1,) * (values.dim() - 1)), 0)


def num_unmasked(like: Tensor, mask: Tensor | None, dtype: torch.dtype = torch.int64) -> Any:
    """``T`` of ``like [T, ...]`` as a number; with a mask a scalar tensor, for the host does not know it."""
    return like.shape[0] if mask is None else (mask == 0).sum().to(dtype)
