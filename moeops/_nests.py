"""Nests (dicts, lists, tuples) of tensors: those of torch's tree functions, and a tensor on its own without them.

A layer's input is one tensor nearly always. torch's tree functions then cost more than the rest of a small call's
Python, and a compiled function that calls them is guarded on their registry, which a precompiled function
(``aot_compile``) cannot carry: https://github.com/pytorch/pytorch/issues/191378.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree

_TENSOR = "one tensor"  # the structure of a tensor, which error messages print


def leaves(nest: Any) -> list[Any]:
    """The leaves of a nest, in the order in which ``flatten`` has them."""
    return [nest] if isinstance(nest, Tensor) else _pytree.tree_leaves(nest)


def flatten(nest: Any) -> tuple[list[Any], Any]:
    """The leaves, and the structure that ``unflatten`` takes; equal structures compare equal."""
    return ([nest], _TENSOR) if isinstance(nest, Tensor) else _pytree.tree_flatten(nest)


def unflatten(leaves: list[Any], structure: Any) -> Any:
    """The nest of this structure with other leaves."""
    return leaves[0] if structure is _TENSOR else _pytree.tree_unflatten(leaves, structure)


def map_leaves(function: Callable[..., Any], nest: Any, *others: Any) -> Any:
    """The nest of what ``function`` returns for each leaf, and those of nests of the same structure."""
    if isinstance(nest, Tensor):
        return function(nest, *others)
    return _pytree.tree_map(function, nest, *others)
