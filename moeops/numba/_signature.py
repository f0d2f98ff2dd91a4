"""The small language that declares a kernel's tensors, numbers and outputs, and what is read from it.

``"x[T, D], bias[D], scale: float = 1.0 -> y[T, D]: x, norm[T]: float32, _tmp[T, D]: float32"``
"""

from __future__ import annotations

import ast
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
    "int": (torch.int32, torch.int64),
    "bool": (torch.bool,),
}
OUTPUT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
SCALARS = {"int": "SymInt", "float": "float", "bool": "bool"}
HINT = "Write it like 'x[T, D], scale: float = 1.0 -> y[T, D]: x'."
_ITEM = re.compile(
    r"^\s*(?P<name>[A-Za-z_]\w*)\s*(?:\[(?P<dims>.*)\])?"
    r"\s*(?::\s*(?P<kind>\w+))?\s*(?:=\s*(?P<default>\S+))?\s*$"
)
_SIZE_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.FloorDiv,
    ast.Mod,
    ast.Name,
    ast.Load,
    ast.Constant,
)
_CONDITION_NODES = (
    *_SIZE_NODES,
    ast.Compare,
    ast.Lt,
    ast.LtE,
    ast.Gt,
    ast.GtE,
    ast.Eq,
    ast.NotEq,
    ast.BoolOp,
    ast.And,
    ast.Or,
)


@dataclass(frozen=True)
class Expression:
    """Integer arithmetic over size names, evaluated on ints and symbolic ints alike."""

    text: str
    names: tuple[str, ...]
    is_name: bool  # a single name, which an input's dimension binds
    code: Any

    @classmethod
    def parse(cls, op: str, text: str, *, condition: bool = False) -> Expression:
        """Read one expression; anything but names, whole numbers and + - * // % is refused."""
        text = text.strip()
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError:
            tree = None
        nodes = list(ast.walk(tree)) if tree is not None else []
        allowed = _CONDITION_NODES if condition else _SIZE_NODES
        if tree is None or not all(
            isinstance(node, allowed)
            and not (isinstance(node, ast.Constant) and type(node.value) is not int)
            for node in nodes
        ):
            raise ValueError(
                f"{op}: signature must hold sizes made of names, whole numbers and + - * // %, got {text!r}. {HINT}"
            )
        names = tuple(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name)))
        return cls(text, names, names == (text,), compile(tree, f"<{text}>", "eval"))

    def __call__(self, sizes: Mapping[str, Any]) -> Any:
        """The value for these sizes."""
        return sizes[self.text] if self.is_name else eval(self.code, {"__builtins__": {}}, sizes)


@dataclass(frozen=True)
class TensorArg:
    """An input tensor: its dimensions, and whether it holds floats, integers or booleans."""

    name: str
    dims: tuple[Expression, ...]
    kind: str


@dataclass(frozen=True)
class ScalarArg:
    """A number that is the same for all rows."""

    name: str
    kind: str
    default: int | float | bool | None


@dataclass(frozen=True)
class Output:
    """An output or, if its name starts with an underscore, scratch space that is not returned."""

    name: str
    dims: tuple[Expression, ...]
    dtype: str  # a key of OUTPUT_DTYPES, "float", or the name of an input tensor

    @property
    def scratch(self) -> bool:
        """Allocated, handed to the function, and dropped."""
        return self.name.startswith("_")


@dataclass(frozen=True)
class Signature:
    """Everything that a signature string says. What is derived from it is kept, because every call asks for it."""

    text: str
    inputs: tuple[TensorArg | ScalarArg, ...]
    outputs: tuple[Output, ...]
    conditions: tuple[Expression, ...]
    row_dim: str

    @cached_property
    def tensors(self) -> tuple[TensorArg, ...]:
        """The input tensors, in order."""
        return tuple(item for item in self.inputs if isinstance(item, TensorArg))

    @cached_property
    def scalars(self) -> tuple[ScalarArg, ...]:
        """The numbers, in order."""
        return tuple(item for item in self.inputs if isinstance(item, ScalarArg))

    @cached_property
    def returned(self) -> tuple[Output, ...]:
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

    def is_row(self, item: TensorArg | Output) -> bool:
        """The rule sees one row of this tensor, not the whole."""
        return bool(item.dims) and item.dims[0].text == self.row_dim

    def schema(self, name: str) -> str:
        """The op's schema in torch's language."""
        arguments = []
        for item in self.inputs:
            if isinstance(item, TensorArg):
                arguments.append(f"Tensor {item.name}")
            else:
                default = "" if item.default is None else f"={item.default}"
                arguments.append(f"{SCALARS[item.kind]} {item.name}{default}")
        results = ", ".join("Tensor" for _ in self.returned)
        return f"{name}({', '.join(arguments)}) -> {f'({results})' if len(self.returned) != 1 else results}"

    def output_dtype(self, output: Output, tensors: Mapping[str, Tensor]) -> torch.dtype:
        """The type of an output for these inputs."""
        if output.dtype == "float":
            return _checks.accumulate_dtype(self._first_float(tensors))
        if output.dtype in OUTPUT_DTYPES:
            return OUTPUT_DTYPES[output.dtype]
        return tensors[output.dtype].dtype

    def _first_float(self, tensors: Mapping[str, Tensor]) -> torch.dtype:
        for item in self.tensors:
            if item.kind == "float":
                return tensors[item.name].dtype
        return torch.float32

    def is_float(self, output: Output) -> bool:
        """Holds floats, whatever the inputs' types are."""
        if output.dtype in ("float", "float32", "float64"):
            return True
        return any(item.name == output.dtype and item.kind == "float" for item in self.tensors)

    def sizes(
        self, values: Sequence[Any], check: Callable[[Any, Callable[[], str]], None]
    ) -> dict[str, Any]:
        """Bind every size name; shapes that disagree go to ``check(holds, message)``."""
        sizes: dict[str, Any] = {}
        for item, value in zip(self.inputs, values, strict=True):
            if isinstance(item, ScalarArg):
                if item.kind == "int":
                    sizes[item.name] = value
                continue
            for dim, size in zip(item.dims, value.shape, strict=True):
                if dim.is_name and dim.text not in sizes:
                    sizes[dim.text] = size
        for item, value in zip(self.inputs, values, strict=True):
            if isinstance(item, ScalarArg):
                continue
            for index, dim in enumerate(item.dims):
                size, want = value.shape[index], dim(sizes)
                if size is not want:
                    check(size == want, partial(_size_message, item.name, value, index, dim, want))
        return sizes


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
    row_dim: str | None = None,
    by_row: bool = True,
) -> Signature:
    """Read a signature string.

    Args:
        op: name of the op, for messages.
        text: ``"inputs -> outputs"``.
        require: conditions on the sizes and int parameters that a call must meet, such as ``"1 <= top_k <= E"``.
        row_dim: the dimension that is cut into rows; ``None`` for the first dimension of the first tensor.
        by_row: every output must be cut into rows.

    Raises:
        ValueError: the text is not a signature.
    """
    if text.count("->") != 1:
        raise ValueError(
            f"{op}: signature must have one '->' between inputs and outputs, got {text!r}. {HINT}"
        )
    left, right = text.split("->")
    inputs = tuple(_input(op, part) for part in split_items(left))
    outputs = tuple(_output(op, part) for part in split_items(right))
    tensors = [item for item in inputs if isinstance(item, TensorArg)]
    if not tensors:
        raise ValueError(f"{op}: signature must name an input tensor, got {text!r}. {HINT}")
    signature = Signature(
        text.strip(),
        inputs,
        outputs,
        tuple(Expression.parse(op, part, condition=True) for part in require),
        row_dim or tensors[0].dims[0].text,
    )
    _check(op, signature, by_row)
    return signature


def split_items(text: str) -> list[str]:
    """Cut at commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    parts.append(text[begin:])
    return [part.strip() for part in parts if part.strip()]


def _match(op: str, text: str) -> re.Match[str]:
    match = _ITEM.match(text)
    if match is None:
        raise ValueError(
            f"{op}: signature must be made of items like 'x[T, D]', got {text!r}. {HINT}"
        )
    return match


def _dims(op: str, text: str) -> tuple[Expression, ...]:
    return tuple(Expression.parse(op, part) for part in split_items(text))


def _input(op: str, text: str) -> TensorArg | ScalarArg:
    match = _match(op, text)
    name, dims, kind, default = match.group("name", "dims", "kind", "default")
    if dims is not None:
        kind = kind or "float"
        if kind not in KINDS or default is not None:
            raise ValueError(
                f"{op}: signature must give an input tensor one of the kinds {tuple(KINDS)} and no default, "
                f"got {text!r}. {HINT}"
            )
        if not _dims(op, dims):
            raise ValueError(
                f"{op}: signature must give an input tensor at least one dimension, got {text!r}. Use a number."
            )
        return TensorArg(name, _dims(op, dims), kind)
    if kind not in SCALARS:
        raise ValueError(
            f"{op}: signature must give a number one of the types {tuple(SCALARS)}, got {text!r}. {HINT}"
        )
    return ScalarArg(name, kind, None if default is None else _default(op, text, kind, default))


def _default(op: str, text: str, kind: str, default: str) -> int | float | bool:
    try:
        value = ast.literal_eval(default)
    except (SyntaxError, ValueError):
        value = None
    fits = {
        "int": type(value) is int,
        "float": type(value) in (int, float),
        "bool": type(value) is bool,
    }
    if not fits[kind]:
        raise ValueError(f"{op}: signature must give a {kind} default, got {text!r}. {HINT}")
    assert value is not None
    return float(value) if kind == "float" else value


def _output(op: str, text: str) -> Output:
    match = _match(op, text)
    name, dims, dtype, default = match.group("name", "dims", "kind", "default")
    if dims is None or dtype is None or default is not None:
        raise ValueError(
            f"{op}: signature must give an output dimensions and a type, got {text!r}. {HINT}"
        )
    return Output(name, _dims(op, dims), dtype)


def _check(op: str, signature: Signature, by_row: bool) -> None:
    """Names are unique, sizes are known, and outputs are what a kernel can write."""
    text = signature.text
    for name in signature.names:
        if signature.names.count(name) > 1:
            raise ValueError(
                f"{op}: signature must use a name once, got {name!r} twice in {text!r}. Rename one."
            )
    if not signature.returned:
        raise ValueError(
            f"{op}: signature must have an output, got {text!r}. Names with '_' are scratch."
        )
    known = {item.name for item in signature.scalars if item.kind == "int"}
    for tensor in signature.tensors:
        known |= {dim.text for dim in tensor.dims if dim.is_name}
    expressions = [dim for tensor in signature.tensors for dim in tensor.dims]
    expressions += [dim for output in signature.outputs for dim in output.dims]
    for expression in (*expressions, *signature.conditions):
        for name in expression.names:
            if name not in known:
                raise ValueError(
                    f"{op}: signature must name sizes of its inputs, got {name!r} in {expression.text!r}. "
                    f"The sizes are {sorted(known)}."
                )
    floats = [signature.is_float(output) for output in signature.returned]
    if floats != sorted(floats, reverse=True):
        raise ValueError(
            f"{op}: signature must list float outputs before others, got {text!r}. "
            "torch.library.opcheck adds the outputs up from the left."
        )
    types = (*OUTPUT_DTYPES, "float", *(tensor.name for tensor in signature.tensors))
    for output in signature.outputs:
        if output.dtype not in types:
            raise ValueError(
                f"{op}: signature must give {output.name} a type out of {types}, got {output.dtype!r}. Pick one."
            )
        if by_row and not signature.is_row(output):
            raise ValueError(
                f"{op}: signature must give {output.name} the rows {signature.row_dim!r} as first dimension, "
                f"got {output.dims[0].text if output.dims else 'none'!r}. A rule writes its own row only."
            )
