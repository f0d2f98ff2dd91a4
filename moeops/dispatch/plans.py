"""Plans for rows whose number is fixed before it is known how many there are. T tokens, K experts each, W ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeops.types import TokenPlan


def gathered_rows(
    num_tokens: int, top_k: int, size: int, num_expert: int, share: tuple[int, int]
) -> tuple[int, bool]:
    """Say how many rows a rank's experts work on where all tokens come to all ranks.

    Args:
        num_tokens: ``T`` of each rank.
        top_k: ``K``.
        size: ``W``.
        num_expert: ``E_local``.
        share: the rows as a part of ``T * K``: numerator, denominator.

    Returns:
        ``R``, and whether more pairs can come.
    """
    numerator, denominator = share
    # A gate that chooses no expert twice sends a token to E_local of them at most.
    numerator *= top_k
    most = size * min(top_k, num_expert)
    if numerator > most * denominator:
        numerator, denominator = most, 1
    may_lose = numerator < size * top_k * denominator
    # In integers, which stay exact where the number is symbolic.
    return -(-num_tokens * numerator // denominator), may_lose


def gathered_rows_of_pairs(num_pairs: int, size: int, share: tuple[int, int]) -> tuple[int, bool]:
    """The same where a rank has at most so many pairs that are not dropped."""
    numerator, denominator = share
    return -(-num_pairs * numerator // denominator), numerator < size * denominator


def rows_of_leg(
    num_tokens: int, top_k: int, size: int, num_expert: int, sizes: Sequence[int]
) -> tuple[int, bool]:
    """The same for a chunk of the tokens; ``sizes`` are the share, and the pairs of a rank in all, -1 for ``T * K``."""
    numerator, denominator, num_pairs = sizes
    share = (numerator, denominator)
    if isinstance(num_pairs, int) and num_pairs < 0:
        return gathered_rows(num_tokens, top_k, size, num_expert, share)
    return gathered_rows_of_pairs(torch.sym_min(num_pairs, num_tokens * top_k), size, share)


def plan_what_fits(ids: Tensor, num_expert: int, num_rows: int) -> TokenPlan:
    """Sort pairs by expert into so many rows; those beyond are dropped, the last expert's first.

    Args:
        ids: ``[T, K]``, -1 for what is of other ranks.
        num_expert: ``E_local``.
        num_rows: ``R``, at most ``T * K``.
    """
    whole = TokenPlan(*torch.ops.moeops.sort_tokens(ids, num_expert))
    torch._check(num_rows <= whole.row_to_pair.shape[0])
    offsets = whole.expert_offsets.clamp(max=num_rows)
    kept = whole.pair_to_row < offsets[-1]
    return TokenPlan(
        whole.row_to_pair.narrow(0, 0, num_rows),
        torch.where(kept, whole.pair_to_row, num_rows),
        offsets,
    )


def plan_of_buffers(size: int, num_expert: int, capacity: int, device: torch.device) -> TokenPlan:
    """Plan buffers ``[W, E_local, C]`` as rows, each a token with one expert: ranks and experts transposed."""
    index = torch.arange(size * num_expert * capacity, dtype=torch.int32, device=device)
    ends = torch.arange(num_expert + 1, dtype=torch.int32, device=device)
    return TokenPlan(
        index.view(size, num_expert, capacity).transpose(0, 1).reshape(-1),
        index.view(num_expert, size, capacity).transpose(0, 1).reshape(-1, 1),
        ends * (size * capacity),
    )
