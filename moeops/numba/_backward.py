"""A backward rule is a row kernel whose signature follows from the names of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeops.numba._rules import ROW, Rule
from moeops.numba._signature import Item, Signature


def backward_signature(op: str, own: Signature, rule: Callable[..., Any]) -> Signature:
    """The signature of the backward rule ``op``, from its parameters and the differentiated op's signature."""
    names = rule.__code__.co_varnames[: rule.__code__.co_argcount]
    floats = {output.name: output for output in own.returned if own.is_float(output)}
    inputs = {item.name: item for item in own.tensors if item.kind == "float"}
    others = {item.name: item for item in (*own.inputs, *own.returned)}
    must = f"{op}: rule {Rule(op, rule, ()).where} must"
    got = f"got ({', '.join(names)})"
    read: list[Item] = []
    written: list[Item] = []
    for name in names:
        target = name.removeprefix("grad_")
        if name in others:
            read.append(_as_input(own, name, others[name]))
        elif name.startswith("grad_") and target in floats:
            read.append(_as_input(own, name, floats[target]))
        elif name.startswith("grad_") and target in inputs:
            if not own.is_row(inputs[target]):
                raise ValueError(
                    f"{must} write gradients of row tensors only, got {name}: {target} is shared by all rows. Use "
                    "gradient() and sum over the rows in PyTorch."
                )
            if target not in names:
                raise TypeError(
                    f"{must} also have the parameter {target!r} when it has {name}, {got}. Add it; it gives the "
                    "gradient its type."
                )
            written.append(Item(name, target, inputs[target].dims))
        elif name != ROW:
            choice = [*others, *(f"grad_{n}" for n in (*floats, *inputs))]
            raise TypeError(
                f"{must} have parameters out of ({', '.join(choice)}), got {name!r}. Rename it."
            )
    if not written:
        raise ValueError(
            f"{must} have a parameter grad_<input> to write, {got}. The inputs are {list(inputs)}."
        )
    signature = Signature(rule.__name__, tuple(read), tuple(written), (), own.row_dim)
    for dim in (dim for item in (*read, *written) for dim in item.dims):
        for size in dim.names:
            if size not in signature.size_names:
                raise TypeError(
                    f"{must} also have the parameter {size!r}, a size of its tensors, {got}. Add it."
                )
    return signature


def _as_input(own: Signature, name: str, item: Item) -> Item:
    """How an input or output of an op is declared as an input of its backward."""
    kind = item.kind
    if item in own.outputs:
        kind = "float" if own.is_float(item) else "bool" if kind == "bool" else "int"
    return Item(name, kind, item.dims)
