"""What ranks tell each other of rows before they send them. T tokens, K experts each, W ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops.comm.groups import RankGroup
from moeops.dispatch.base import row_size
from moeops.ops.sorting import count_tokens

_SIGNED = (*_checks.FLOAT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def count_cells(targets: Tensor, size: int, points: list[tuple[int, int]]) -> Tensor:
    """Count each of ``size`` targets among ``[T, K]``, cell by cell of the tokens: ``[size, cells]``."""
    num_cells = len(points) - 1
    if num_cells > 1:
        token = torch.arange(targets.shape[0], device=targets.device)
        inner = [token >= targets.shape[0] * above // below for above, below in points[1:-1]]
        cell = torch.stack(inner).sum(0, keepdim=True).t().to(targets.dtype)  # [T, 1]
        targets = torch.where(targets < 0, -1, targets + size * cell)
    return count_tokens(targets, num_cells * size).view(num_cells, size).t()


def copy_to_host(parts: list[Tensor]) -> list[list[int]]:
    """Copy numbers of at least 0 to the host, all at once; a list for each tensor."""
    numbers = torch.cat([part.flatten() for part in parts]).cpu().tolist()
    for number in numbers:
        torch._check(number >= 0)
    lists, start = [], 0
    for part in parts:
        lists.append(numbers[start : start + part.numel()])
        start += part.numel()
    return lists


def row_signature(leaves: list[Tensor]) -> tuple[int, int]:
    """Elements per row over all leaves, and their types as digits to base 16."""
    elements = code = 0
    for leaf in leaves:
        elements = elements + row_size(leaf.shape[1:])
        digit = _SIGNED.index(leaf.dtype) + 1 if leaf.dtype in _SIGNED else 15
        code = (code * 16 + digit) % 2**28
    return elements, code


def check_signatures(group: RankGroup, leaves: list[Tensor], signatures: list[int]) -> None:
    """All ranks send rows of one size and type: every rank sees all of them, so every rank fails or none.

    Args:
        group: the ranks.
        leaves: of this rank's input.
        signatures: ``row_signature`` of every rank's.

    Raises:
        ValueError: they differ.
    """
    mine = row_signature(leaves)
    for rank in range(group.size):
        theirs = signatures[2 * rank : 2 * rank + 2]
        if torch.compiler.is_compiling():
            torch._check(theirs[0] == mine[0])
            torch._check(theirs[1] == mine[1])
        elif tuple(theirs) != mine:
            raise ValueError(
                "ExactDispatcher: moe_inp must have rows of the same size and dtype on every rank of group "
                f"{group.name!r}, got {mine[0]} elements of {[leaf.dtype for leaf in leaves]} on rank {group.rank} of "
                f"{group.size} and {_describe_signature(*theirs)} on rank {rank}. Check the layer's input on these "
                "ranks."
            )


def _describe_signature(elements: int, code: int) -> str:
    """The inverse of ``row_signature`` as far as it goes."""
    digits = [int(digit, 16) for digit in f"{code:x}"]
    names = [_SIGNED[d - 1] if 0 < d <= len(_SIGNED) else "another type" for d in digits]
    return f"{elements} elements of {names}"
