"""Ops made of a raw CUDA kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from moeops.numba import _launch
from moeops.numba._ops import Op
from moeops.numba._row_op import add_backward
from moeops.numba._rules import Rule, with_compiled_callees
from moeops.numba._signature import Signature

_Dimensions = Callable[[Mapping[str, int]], tuple[int, int, int]]


class BlockOp(Op):
    """An op made of a raw CUDA kernel; see ``moeops.numba.block_kernel``."""

    backward = add_backward

    def __init__(
        self,
        name: str,
        kernel: Any,
        signature: Signature,
        *,
        grid: Any,
        threads: Any,
        shared: Any,
        replace: bool,
    ) -> None:
        function = getattr(kernel, "py_func", kernel)
        rule = Rule.read(name, function, signature, "kernel")
        self.function = kernel
        self.grid = _dimensions(name, "grid", grid, signature)
        self.threads = _dimensions(name, "threads", threads, signature)
        self.shared = _dimensions(name, "shared", shared, signature)
        self._cpu_function: Callable[..., Any] | None = None
        super().__init__(name, rule, signature, rule.names, replace)

    def cpu(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: what the op does with CPU tensors; takes the op's inputs, returns its outputs.

        Raises:
            ValueError: it was given already.
        """
        if self._cpu_function is not None:
            raise ValueError(
                f"{self.name}: cpu must be given once, got a second function. Keep one of them."
            )
        self._cpu_function = function
        return function

    def _build(self, cuda: Any) -> Any:
        copy = with_compiled_callees(self.rule.function, _launch.device_function(cuda))
        given = self.function
        if given is not self.rule.function and not _launch.simulating():
            return type(given)(copy, targetoptions=dict(given.targetoptions))
        return cuda.jit(copy)

    def _geometry(self, sizes: Mapping[str, int]) -> _launch.Geometry:
        grid = self.grid(sizes)
        if 0 in grid:
            return grid, (0, 0, 0), 0
        return grid, self.threads(sizes), self.shared(sizes)[0]

    def _run_cpu(self, *values: Any) -> Any:
        values = self._filled(values)
        self._checked_sizes(values)
        if self._cpu_function is None:
            raise NotImplementedError(
                f"{self.name}: the tensors must be on cuda, got cpu, for which {self.rule.where} has no function. "
                "Give one with @op.cpu."
            )
        return self._cpu_function(*values)


def _dimensions(op: str, what: str, value: Any, signature: Signature) -> _Dimensions:
    """A grid, a block or a number of bytes, given as such or as a function of some of the sizes by name."""

    def three(value: Any) -> tuple[int, int, int]:
        numbers = (value,) if isinstance(value, int) else tuple(value)
        if not 1 <= len(numbers) <= 3 or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(
                f"{op}: {what} must be 1 to 3 whole numbers of at least 0, got {value!r}. Check it."
            )
        return (*numbers, 1, 1, 1)[:3]

    if not callable(value):
        fixed = three(value)
        return lambda sizes: fixed
    names = tuple(inspect.signature(value).parameters)
    known = signature.size_names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{op}: {what} must be a function of sizes out of {sorted(known)}, got {unknown}. Rename them."
        )
    return lambda sizes: three(value(*[sizes[name] for name in names]))
