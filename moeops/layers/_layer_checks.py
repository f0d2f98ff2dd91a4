"""Checks of what users hand to a layer: inputs, gates, experts, masks. T tokens, K experts per token."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from moeops import _checks
from moeops._imports import constant_when_traced
from moeops.layers._weights import check_no_dtensor
from moeops.types import Routing, SlotRouting


def check_leaves(op: str, leaves: list[Any]) -> None:
    """The input is a nest of tensors with equal sizes in dimension 0, on one device."""
    if not leaves:
        raise ValueError(f"{op}: moe_inp must hold a tensor, got an empty nest. Pass the tokens.")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{op}: moe_inp must be a tensor or a nest of tensors, got {_checks.describe(leaf)} in it. "
                "Pass other values to the expert's constructor."
            )
        check_no_dtensor(op, "moe_inp", leaf)
        if leaf.is_nested:
            raise NotImplementedError(
                f"{op}: moe_inp must hold tensors [T, ...], got a nested tensor of shape {tuple(leaf.shape)}. Pass its "
                ".values(), or use FMoETransformerMLP, which takes jagged tensors."
            )
        if leaf.dim() == 0 or leaf.shape[0] != leaves[0].shape[0]:
            raise ValueError(
                f"{op}: moe_inp must hold tensors with the same tokens in dimension 0, got "
                f"{[list(other.shape) for other in leaves if isinstance(other, Tensor)]}. Reshape them to [T, ...]."
            )
        _checks.check_device(op, "moe_inp", leaf, "its first tensor", leaves[0])


def check_gate_input(op: str, first: Tensor) -> None:
    """A gate that sees the first leaf can read it."""
    if first.dim() < 2:
        raise ValueError(
            f"{op}: moe_inp must have shape [T, d_model], got {_checks.describe(first)}. Put the tensor for the gate "
            "first, or give the gate nested_input = True."
        )


def check_choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """``value`` is one of the words."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {allowed}, got {value!r}. Pick one of them.")


def check_routing(
    op: str, gate: nn.Module, routing: Routing | SlotRouting, x: Tensor, num_experts: int
) -> None:
    """The tensors of a gate's record fit the tokens and each other."""
    op = f"{op}: {type(gate).__name__}"
    first, second = routing._fields[:2]
    width = "K" if isinstance(routing, Routing) else "E * S"
    for name, value in zip((first, second), routing[:2], strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{op} must return a tensor as {name}, got {_checks.describe(value)}. "
                f"Return ({first} [T, {width}], {second} [T, {width}])."
            )
        if value.dim() != 2 or value.shape[0] != x.shape[0] or value.shape[1] < 1:
            raise ValueError(
                f"{op} must return {name} of shape [{x.shape[0]}, {width}], got {_checks.describe(value)}. "
                f"Return ({first} [T, {width}], {second} [T, {width}])."
            )
        if value.device != x.device:
            raise ValueError(
                f"{op} must return {name} on {x.device} like x, got {_checks.describe(value)}. "
                "Create tensors on the device of x."
            )
        if name == "topk_ids" and value.dtype not in _checks.ID_DTYPES:
            raise TypeError(
                f"{op} must return int32 or int64 topk_ids, got {_checks.describe(value)}. "
                "Return (topk_ids, topk_weights), in this order."
            )
        if name != "topk_ids" and value.dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(
                f"{op} must return float {name}, got {_checks.describe(value)}. "
                f"Return ({first}, {second}), in this order."
            )
    if routing[0].shape != routing[1].shape:
        raise ValueError(
            f"{op} must return {second} of the shape of {first} {list(routing[0].shape)}, got "
            f"{_checks.describe(routing[1])}. Return one weight per chosen expert, or two per slot."
        )
    if isinstance(routing, Routing):
        if routing.num_rows is not None:
            _checks.check_int(op, "num_rows", routing.num_rows, 0, "Use None for T * K.")
        return
    if routing.dispatch_weights.shape[1] % num_experts != 0:
        raise ValueError(
            f"{op} must return a multiple of the {num_experts} experts as the number of slots, got "
            f"{_checks.describe(routing.dispatch_weights)}. Give every expert as many slots."
        )
    if routing.tokens_per_group is not None:
        _checks.check_int(
            op, "tokens_per_group", routing.tokens_per_group, 1, "Use None for one group."
        )


def check_expert_output(op: str, index: int, leaves: list[Any], count: int) -> None:
    """Every output leaf of one expert has the rows that the expert was given."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{op}: experts must return tensors, got {_checks.describe(leaf)} from expert {index}. "
                "Return a tensor or a nest of tensors."
            )
        if leaf.dim() == 0 or leaf.shape[0] != count:
            raise ValueError(
                f"{op}: expert {index} must return its {count} rows in dimension 0, got {_checks.describe(leaf)}. "
                "An expert maps rows to rows."
            )


def warn_of_folded_rows(op: str, experts: Iterable[Any]) -> None:
    """Name modules that Inductor is known to miscompile where the number of rows is a symbol without a value."""
    for index, expert in enumerate(experts):
        modules = expert.modules() if isinstance(expert, nn.Module) else ()
        if any(isinstance(module, nn.MultiheadAttention) for module in modules):
            _warn_at_compile_time(
                f"{op}: experts must keep their rows in a dimension of their own under Inductor, got "
                f"nn.MultiheadAttention in expert {index}, which folds rows and heads into one. Inductor (torch 2.13 "
                "and before) takes the number of rows for a constant there and computes wrong values without an "
                'error. Leave this layer out of the compiled model, or compile it with backend="aot_eager".'
            )
            return


@constant_when_traced
def _warn_at_compile_time(text: str) -> None:
    """Warn once per trace: a compiler runs this and keeps nothing of it in the graph."""
    warnings.warn(text, stacklevel=2)


def check_same_row(op: str, parts: Sequence[Tensor]) -> None:
    """The experts' rows have one shape."""
    for index, part in enumerate(parts):
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{op}: experts must all return rows of the same shape, got {list(part.shape[1:])} from expert {index} "
                f"and {list(parts[0].shape[1:])} from expert 0. Outputs of several experts are summed."
            )


def check_rows(op: str, leaves: list[Any], num_rows: int) -> None:
    """The experts' joint output is made of float tensors with the rows that they were given."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dtype not in _checks.FLOAT_DTYPES or leaf.dim() < 1:
            raise TypeError(
                f"{op}: experts must return float tensors with their rows in dimension 0, got "
                f"{_checks.describe(leaf)}. Outputs of several experts are summed."
            )
        _checks.check_size(op, "experts' output", leaf, 0, num_rows, "its rows")


def check_mask(op: str, mask: Any, x: Tensor | None) -> None:
    """``mask`` holds one number per token of ``x``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(
            f"{op}: mask must be a tensor of numbers or bools, got {_checks.describe(mask)}. 0 marks the tokens to run."
        )
    if x is None:
        return
    if mask.numel() != x.shape[0]:
        raise ValueError(
            f"{op}: mask must have one entry for each of the {x.shape[0]} tokens, got {_checks.describe(mask)}. "
            "Pass a mask that fits this input."
        )


def check_mask_dict(op: str, mask_dict: Any) -> dict[int, Any] | None:
    """``mask_dict`` maps mask values other than 0 to numbers or tensors."""
    if mask_dict is None:
        return None
    for key, value in dict(mask_dict).items():
        if not isinstance(key, int) or key == 0:
            raise ValueError(
                f"{op}: mask_dict must have ints other than 0 as keys, got {key!r}. 0 marks the tokens to run."
            )
        if not isinstance(value, (int, float, Tensor)):
            raise TypeError(
                f"{op}: mask_dict must hold numbers or tensors, got {_checks.describe(value)} for {key}. "
                "Pass the expert output of such a token."
            )
    return dict(mask_dict)


def check_shards(op: str, num_shards: Any, world_size: int, expert: Any) -> None:
    """The ranks can be cut into groups of ``num_shards`` that hold experts which can be sharded."""
    name = "expert_tensor_parallel_size"
    _checks.check_int(op, name, num_shards, 1, "Use 1 for whole experts.")
    if world_size % num_shards:
        raise ValueError(
            f"{op}: {name} must be a divisor of the {world_size} ranks that hold the experts, got {num_shards}. Choose "
            "another number of shards."
        )
    if num_shards > 1 and expert is not None:
        raise ValueError(
            f"{op}: {name} must be 1 where expert is given, got {num_shards}: nobody knows how to cut such experts. "
            "Use FMoETransformerMLP."
        )
