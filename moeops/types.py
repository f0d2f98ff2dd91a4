"""Frozen records passed between calls."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["TokenPlan"]


class TokenPlan(NamedTuple):
    """Where every token-expert pair goes: what ``combine`` needs from ``dispatch``.

    Pair ``t * K + k`` is choice ``k`` of token ``t``. Rows are in expert order, token order within an expert; the
    rows of dropped pairs come last, from ``expert_offsets[E]`` on.

    Attributes:
        row_to_pair: ``[N]`` int32, the pair held by each row.
        pair_to_row: ``[T, K]`` int32, the row of each pair; the inverse permutation.
        expert_offsets: ``[E + 1]`` int32, expert ``e`` owns rows ``expert_offsets[e]`` to ``expert_offsets[e + 1]``.
    """

    row_to_pair: Tensor
    pair_to_row: Tensor
    expert_offsets: Tensor
