"""The small language that declares a kernel's tensors, numbers and outputs, and what is read from it.

``"x[T, D], bias[D], scale: float = 1.0 -> y[T, D]: x, norm[T]: float32, _tmp[T, D]: float32"``
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from moeops import _checks

KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "float": _checks.FLOAT_DTYPES,
    "int": _checks.ID_DTYPES,
    "bool": (torch.bool,),
}
OUTPUT_DTYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "int64", "int32", "bool")
}
SCALARS = {"int": "SymInt", "float": "float", "bool": "bool"}
HINT = "Write it like 'x[T, D], scale: float = 1.0 -> y[T, D]: x'."
_ITEM = re.compile(
    r"(?P<name>[A-Za-z_]\w*)\s*(?:\[(?P<dims>.*)\])?"
    r"\s*(?::\s*(?P<kind>\w+))?\s*(?:=\s*(?P<default>\S+))?"
)
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
Evaluator = Callable[[Mapping[str, Any]], Any]
# Given whether a requirement on the arguments holds, and what to say where it does not.
Check = Callable[[Any, Callable[[], str]], None]


def _refused(op: str, requirement: str, got: str, hint: str = HINT) -> ValueError:
    return ValueError(f"{op}: signature must {requirement}, got {got}. {hint}")


@dataclass(frozen=True)
class Expression:
    """Integer arithmetic over size names, evaluated on ints and symbolic ints alike."""

    text: str
    names: tuple[str, ...]
    is_name: bool  # a single name, which an input's dimension binds
    value: Evaluator

    @classmethod
    def parse(cls, op: str, text: str, *, condition: bool = False) -> Expression:
        """Read one expression; anything but names, whole numbers and + - * // % is refused."""
        text = text.strip()
        try:
            tree = ast.parse(text, mode="eval").body
            value = _condition(tree) if condition else _size(tree)
        except SyntaxError:
            made_of = "hold sizes made of names, whole numbers and + - * // %"
            raise _refused(op, made_of, repr(text)) from None
        found = (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        names = tuple(dict.fromkeys(found))
        return cls(text, names, names == (text,), value)

    def __call__(self, sizes: Mapping[str, Any]) -> Any:
        """The value for these sizes."""
        return self.value(sizes)


def _size(node: ast.expr) -> Evaluator:
    """A function of the sizes, built once from the parts that sizes are made of; SyntaxError for any other."""
    if isinstance(node, ast.Name):
        return operator.itemgetter(node.id)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        number = node.value
        return lambda sizes: number
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        apply, left, right = _ARITHMETIC[type(node.op)], _size(node.left), _size(node.right)
        return lambda sizes: apply(left(sizes), right(sizes))
    raise SyntaxError


def _condition(node: ast.expr) -> Evaluator:
    """The same for comparisons of sizes, joined by ``and`` and ``or``."""
    if isinstance(node, ast.BoolOp):
        join = all if isinstance(node.op, ast.And) else any
        parts = [_condition(value) for value in node.values]
        return lambda sizes: join(part(sizes) for part in parts)
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
        compare = [_COMPARISONS[type(op)] for op in node.ops]
        terms = [_size(term) for term in (node.left, *node.comparators)]

        def holds(sizes: Mapping[str, Any]) -> bool:
            values = [term(sizes) for term in terms]
            return all(c(a, b) for c, a, b in zip(compare, values, values[1:], strict=False))

        return holds
    raise SyntaxError


@dataclass(frozen=True)
class Item:
    """A tensor, or a number that is the same for all rows.

    Attributes:
        name: an output whose name starts with an underscore is scratch space: allocated, handed over, not returned.
        kind: what an input holds, a key of ``KINDS``; of an output a key of ``OUTPUT_DTYPES``, "float", or the name of
            an input tensor that has the same type.
        dims: sizes; none for a number.
        default: of a number, ``None`` where it has none.
    """

    name: str
    kind: str
    dims: tuple[Expression, ...] = ()
    default: int | float | bool | None = None

    @property
    def scratch(self) -> bool:
        """Allocated, handed to the function, and dropped."""
        return self.name.startswith("_")


@dataclass(frozen=True)
class Signature:
    """Everything that a signature string says. What is derived from it is kept, because every call asks for it."""

    text: str
    inputs: tuple[Item, ...]
    outputs: tuple[Item, ...]
    conditions: tuple[Expression, ...]
    row_dim: str

    @cached_property
    def tensors(self) -> tuple[Item, ...]:
        """The input tensors, in order."""
        return tuple(item for item in self.inputs if item.dims)

    @cached_property
    def scalars(self) -> tuple[Item, ...]:
        """The numbers, in order."""
        return tuple(item for item in self.inputs if not item.dims)

    @cached_property
    def returned(self) -> tuple[Item, ...]:
        """The outputs without the scratch space."""
        return tuple(output for output in self.outputs if not output.scratch)

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the input tensors, then of the outputs without the scratch space."""
        outputs = tuple(output.name for output in self.returned)
        return (*(tensor.name for tensor in self.tensors), *outputs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names that the function's parameters must have, in any order."""
        return tuple(item.name for item in (*self.inputs, *self.outputs))

    @cached_property
    def size_names(self) -> frozenset[str]:
        """Names of the inputs' sizes and of the int parameters."""
        sizes = {dim.text for tensor in self.tensors for dim in tensor.dims if dim.is_name}
        return frozenset(sizes | {item.name for item in self.scalars if item.kind == "int"})

    def is_row(self, item: Item) -> bool:
        """The rule sees one row of this tensor, not the whole."""
        return bool(item.dims) and item.dims[0].text == self.row_dim

    def schema(self, name: str) -> str:
        """The op's schema in torch's language."""
        arguments = []
        for item in self.inputs:
            if item.dims:
                arguments.append(f"Tensor {item.name}")
            else:
                default = "" if item.default is None else f"={item.default}"
                arguments.append(f"{SCALARS[item.kind]} {item.name}{default}")
        results = ", ".join("Tensor" for _ in self.returned)
        return f"{name}({', '.join(arguments)}) -> {f'({results})' if len(self.returned) != 1 else results}"

    def results(
        self, values: Sequence[Any], sizes: Mapping[str, Any]
    ) -> list[tuple[Item, list[Any], torch.dtype]]:
        """Every output and scratch space of a call, with its shape and its type."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        floats = [
            t.dtype for t, item in zip(tensors, self.tensors, strict=True) if item.kind == "float"
        ]
        dtypes = {item.name: t.dtype for t, item in zip(tensors, self.tensors, strict=True)}
        dtypes["float"] = _checks.accumulate_dtype(floats[0] if floats else torch.float32)
        dtypes.update(OUTPUT_DTYPES)
        return [
            (output, [dim(sizes) for dim in output.dims], dtypes[output.kind])
            for output in self.outputs
        ]

    def is_float(self, output: Item) -> bool:
        """Holds floats, whatever the inputs' types are."""
        if output.kind in ("float", "float32", "float64"):
            return True
        return any(item.name == output.kind and item.kind == "float" for item in self.tensors)

    def sizes(self, values: Sequence[Any], check: Check) -> dict[str, Any]:
        """Bind every size name; whether shapes fit goes to ``check(holds, message)``, which raises."""
        sizes: dict[str, Any] = {}
        shaped: list[tuple[Item, Tensor]] = []
        for item, value in zip(self.inputs, values, strict=True):
            if item.dims:
                check(value.dim() == len(item.dims), partial(_dim_message, item, value))
                shaped.append((item, value))
                for dim, size in zip(item.dims, value.shape, strict=True):
                    if dim.is_name:
                        sizes.setdefault(dim.text, size)
            elif item.kind == "int":
                sizes[item.name] = value
        for item, value in shaped:
            for index, dim in enumerate(item.dims):
                size, want = value.shape[index], dim(sizes)
                if size is not want:
                    check(size == want, partial(_size_message, item.name, value, index, dim, want))
        return sizes


def _dim_message(item: Item, value: Tensor) -> str:
    got = _checks.describe(value)
    return f"{item.name} must have {len(item.dims)} dimensions, got {got}. Reshape it first."


def _size_message(name: str, value: Tensor, index: int, dim: Expression, want: Any) -> str:
    return (
        f"{name} must have size {want} in dimension {index} ({dim.text}), got {_checks.describe(value)}. "
        "Check the arguments it has to fit."
    )


def parse(
    op: str,
    text: str,
    *,
    require: Sequence[str] = (),
    by_row: bool = True,
) -> Signature:
    """Read a signature string.

    Args:
        op: name of the op, for messages.
        text: ``"inputs -> outputs"``.
        require: conditions on the sizes and int parameters that a call must meet, such as ``"1 <= top_k <= E"``.
        by_row: every output must be cut into rows.

    Raises:
        ValueError: the text is not a signature.
    """
    if text.count("->") != 1:
        raise _refused(op, "have one '->' between inputs and outputs", repr(text))
    left, right = text.split("->")
    inputs = tuple(_input(op, part) for part in split_items(left))
    outputs = tuple(_output(op, part) for part in split_items(right))
    tensors = [item for item in inputs if item.dims]
    if not tensors:
        raise _refused(op, "name an input tensor", repr(text))
    conditions = tuple(Expression.parse(op, part, condition=True) for part in require)
    row_dim = tensors[0].dims[0].text
    signature = Signature(text.strip(), inputs, outputs, conditions, row_dim)
    _check(op, signature, by_row)
    return signature


def split_items(text: str) -> list[str]:
    """Cut at the commas outside of square brackets."""
    parts = re.split(r",(?![^\[]*\])", text)
    return [part.strip() for part in parts if part.strip()]


def _item(op: str, text: str) -> tuple[str, tuple[Expression, ...] | None, str, str | None]:
    """Name, dimensions, what follows the colon, and the default of one item."""
    match = _ITEM.fullmatch(text)
    if match is None:
        raise _refused(op, "be made of items like 'x[T, D]'", repr(text))
    name, dims, kind, default = match.group("name", "dims", "kind", "default")
    if dims is None:
        return name, None, kind, default
    return name, tuple(Expression.parse(op, part) for part in split_items(dims)), kind, default


def _input(op: str, text: str) -> Item:
    name, dims, kind, default = _item(op, text)
    if dims is None:
        if kind not in SCALARS:
            raise _refused(op, f"give a number one of the types {tuple(SCALARS)}", repr(text))
        value = None if default is None else _default(op, text, kind, default)
        return Item(name, kind, default=value)
    kind = kind or "float"
    if kind not in KINDS or default is not None:
        kinds = f"give an input tensor one of the kinds {tuple(KINDS)} and no default"
        raise _refused(op, kinds, repr(text))
    if not dims:
        least = "give an input tensor at least one dimension"
        raise _refused(op, least, repr(text), "Use a number.")
    return Item(name, kind, dims)


def _default(op: str, text: str, kind: str, default: str) -> int | float | bool:
    try:
        value = ast.literal_eval(default)
    except (SyntaxError, ValueError):
        value = None
    fits = {"int": (int,), "float": (int, float), "bool": (bool,)}
    if type(value) not in fits[kind]:
        raise _refused(op, f"give a {kind} default", repr(text))
    return float(value) if kind == "float" else value


def _output(op: str, text: str) -> Item:
    name, dims, kind, default = _item(op, text)
    if not dims or kind is None or default is not None:
        raise _refused(op, "give an output dimensions and a type", repr(text))
    return Item(name, kind, dims)


def _check(op: str, signature: Signature, by_row: bool) -> None:
    """Names are unique, sizes are known, and outputs are what a kernel can write."""
    text = repr(signature.text)
    for name in signature.names:
        if signature.names.count(name) > 1:
            raise _refused(op, "use a name once", f"{name!r} twice in {text}", "Rename one.")
    if not signature.returned:
        raise _refused(op, "have an output", text, "Names with '_' are scratch.")
    known = signature.size_names
    expressions = [dim for item in (*signature.inputs, *signature.outputs) for dim in item.dims]
    for expression in (*expressions, *signature.conditions):
        for name in expression.names:
            if name not in known:
                got = f"{name!r} in {expression.text!r}"
                raise _refused(op, "name sizes of its inputs", got, f"They are {sorted(known)}.")
    floats = [signature.is_float(output) for output in signature.returned]
    if floats != sorted(floats, reverse=True):
        why = "torch.library.opcheck adds the outputs up from the left."
        raise _refused(op, "list float outputs before others", text, why)
    types = (*OUTPUT_DTYPES, "float", *(tensor.name for tensor in signature.tensors))
    for output in signature.outputs:
        if output.kind not in types:
            want = f"give {output.name} a type out of {types}"
            raise _refused(op, want, repr(output.kind), "Pick one.")
        if by_row and not signature.is_row(output):
            want = f"give {output.name} the rows {signature.row_dim!r} as first dimension"
            raise _refused(op, want, repr(output.dims[0].text), "A rule writes its own row only.")
