"""User functions: where they are, what they are called with, and how plain functions they call are compiled too."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeops.numba._signature import Signature

# Functions of these packages are Numba's business.
_FOREIGN = ("numba", "numba_cuda", "numpy")
# A rule may have a parameter of this name: the number of its row.
ROW = "row"
# Attribute of functions that each target implements itself; its value says which.
INTRINSIC = "__moeops_intrinsic__"


class RuleError(RuntimeError):
    """A rule does not compile, raises, or leaves its outputs unwritten."""


@dataclass(frozen=True)
class Rule:
    """A user's function and the place a message points to."""

    op: str
    function: Callable[..., Any]
    names: tuple[str, ...]

    @property
    def where(self) -> str:
        """``my_rule (gates.py:12)``, with the whole path."""
        code = self.function.__code__
        return f"{self.function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"

    @classmethod
    def read(cls, op: str, function: Any, signature: Signature, what: str = "rule") -> Rule:
        """Check that the function's parameters are the signature's names, in any order."""
        if not isinstance(function, types.FunctionType):
            raise TypeError(
                f"{op}: {what} must be a plain Python function, got {function!r}. Decorate a def."
            )
        rule = cls(op, function, ())
        parameters = inspect.signature(function).parameters.values()
        names = tuple(p.name for p in parameters)
        plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)
        allowed = (*signature.names, ROW) if what == "rule" else signature.names
        missing = [name for name in signature.names if name not in names]
        extra = [name for name in names if name not in allowed]
        if not plain or missing or extra:
            raise TypeError(
                f"{op}: {what} {rule.where} must have the parameters ({', '.join(signature.names)}), in any order and "
                f"without defaults, got ({', '.join(names)})"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; not in the signature: {', '.join(extra)}" if extra else "")
                + ". Defaults and further inputs belong into the signature."
            )
        return cls(op, function, names)

    def failed(self, target: str, err: Exception) -> RuleError:
        """What to raise when Numba refuses the rule; the caller raises it from ``err``."""
        # What follows is about the generated loop around the rule.
        message = str(err).split("During: resolving callee")[0]
        text = "\n".join(line.rstrip() for line in message.splitlines() if line.strip())
        return RuleError(
            f"{self.op}: rule {self.where} must compile under Numba for {target}, got {type(err).__name__}:\n{text}\n"
            "Rules are scalar code: loops, arithmetic, math.*, indexing; no dicts, strings, torch or try."
        )

    def raised(self, err: Exception, row: int | None = None) -> RuleError:
        """What to raise when the compiled rule raised ``err``."""
        at = "" if row is None else f" in row {row}"
        return RuleError(
            f"{self.op}: rule {self.where} must not raise, got {type(err).__name__}{at}: {err}. "
            "Check its indices and the values it is given."
        )


def with_compiled_callees(
    function: Callable[..., Any], compile_one: Callable[[Any], Any]
) -> types.FunctionType:
    """A copy of ``function`` in which plain Python functions that it calls by name are compiled by ``compile_one``.

    One helper can so serve rules on the CPU and on CUDA without a decorator. ``compile_one`` gets a copy too, except
    for functions with the attribute ``INTRINSIC``.
    """
    return _copy(function, compile_one, {})


def _copy(function: Any, compile_one: Callable[[Any], Any], done: dict[Any, Any]) -> Any:
    def convert(value: Any) -> Any:
        if not isinstance(value, types.FunctionType) or _is_foreign(value):
            return value
        if hasattr(value, INTRINSIC):
            return compile_one(value)
        if value not in done:
            done[value] = (
                value  # a recursive function keeps its own name, which Numba resolves or refuses
            )
            done[value] = compile_one(_copy(value, compile_one, done))
        return done[value]

    namespace = dict(function.__globals__)
    for name in _global_names(function.__code__):
        if name in namespace:
            namespace[name] = convert(namespace[name])
    cells = tuple(
        types.CellType(convert(cell.cell_contents)) for cell in function.__closure__ or ()
    )
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, cells or None
    )
    copy.__qualname__ = function.__qualname__
    copy.__module__ = function.__module__
    copy.__doc__ = function.__doc__
    return copy


def _global_names(code: types.CodeType) -> set[str]:
    """Names a function may look up, those of nested functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _is_foreign(function: types.FunctionType) -> bool:
    package = (function.__module__ or "").split(".")[0]
    return package in _FOREIGN
