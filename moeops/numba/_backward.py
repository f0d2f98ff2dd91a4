"""A backward rule is a row kernel whose signature follows from the names of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeops.numba._rules import ROW, Rule
from moeops.numba._signature import Output, ScalarArg, Signature, TensorArg, parse


def backward_signature(name: str, own: Signature, rule: Callable[..., Any]) -> Signature:
    """The signature of a backward rule, from its parameters and the op's own signature."""
    op = f"{name}_backward"
    names = rule.__code__.co_varnames[: rule.__code__.co_argcount]
    floats = {output.name: output for output in own.returned if own.is_float(output)}
    inputs = {item.name: item for item in own.tensors if item.kind == "float"}
    others = {item.name: item for item in (*own.inputs, *own.returned)}
    where = Rule(op, rule, ()).where
    left: list[str] = []
    right: list[str] = []
    for name in names:
        target = name.removeprefix("grad_")
        if name == ROW and name not in others:
            continue
        if name in others:
            item = others[name]
        elif name.startswith("grad_") and target in floats:
            item = floats[target]
        elif name.startswith("grad_") and target in inputs:
            if not own.is_row(inputs[target]):
                raise ValueError(
                    f"{op}: rule {where} must write gradients of row tensors only, got {name}: {target} is shared "
                    "by all rows. Use gradient() and sum over the rows in PyTorch."
                )
            right.append(f"{name}[{_dims_text(inputs[target])}]: {target}")
            continue
        else:
            choice = [*others, *(f"grad_{n}" for n in (*floats, *inputs))]
            raise TypeError(
                f"{op}: rule {where} must have parameters out of ({', '.join(choice)}), got {name!r}. Rename it."
            )
        left.append(_input_text(own, name, item))
    if not right:
        raise ValueError(
            f"{op}: rule {where} must have a parameter grad_<input> to write, got ({', '.join(names)}). "
            f"The inputs are {list(inputs)}."
        )
    for part in right:
        # The gradient has the type of its input, and so the input is an argument even where it is not read.
        target = part.split(": ")[1]
        if target not in names:
            raise TypeError(
                f"{op}: rule {where} must also have the parameter {target!r} when it has grad_{target}, got "
                f"({', '.join(names)}). Add it; it gives the gradient its type."
            )
    sizes = [item for item in own.scalars if item.kind == "int" and item.name not in names]
    used = " ".join((*left, *right))
    for item in sizes:
        if item.name in used:
            raise TypeError(
                f"{op}: rule {where} must also have the parameter {item.name!r}, a size of its tensors, got "
                f"({', '.join(names)}). Add it."
            )
    return parse(op, f"{', '.join(left)} -> {', '.join(right)}", row_dim=own.row_dim)


def _dims_text(item: TensorArg | Output) -> str:
    return ", ".join(dim.text for dim in item.dims)


def _input_text(own: Signature, name: str, item: TensorArg | ScalarArg | Output) -> str:
    """How an input or output of an op is declared as an input of its backward."""
    if isinstance(item, ScalarArg):
        return f"{name}: {item.kind}"
    if isinstance(item, TensorArg):
        return f"{name}[{_dims_text(item)}]: {item.kind}"
    kind = "float" if own.is_float(item) else "bool" if item.dtype == "bool" else "int"
    return f"{name}[{_dims_text(item)}]: {kind}"
