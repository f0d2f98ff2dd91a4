"""Ops made of a raw CUDA kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from moeops.numba import _cpu, _cuda
from moeops.numba._ops import Op
from moeops.numba._rules import Rule, with_compiled_callees
from moeops.numba._signature import Signature, TensorArg


class BlockOp(Op):
    """An op made of a raw CUDA kernel; see ``moeops.numba.block_kernel``."""

    def __init__(
        self,
        name: str,
        kernel: Any,
        signature: Signature,
        *,
        grid: Any,
        threads: Any,
        shared: Any,
        zeros: Sequence[str],
        launch: str,
        replace: bool,
    ) -> None:
        function = getattr(kernel, "py_func", kernel)
        rule = Rule.read(name, function, signature, "kernel")
        self.function = kernel
        self.grid = _Dimensions(name, "grid", grid, signature)
        self.threads = _Dimensions(name, "threads", threads, signature)
        self.shared = _Dimensions(name, "shared", shared, signature)
        unknown = [item for item in zeros if item not in {o.name for o in signature.outputs}]
        if unknown:
            raise ValueError(
                f"{name}: zeros must name outputs, got {unknown}. They are {[o.name for o in signature.outputs]}."
            )
        self.zeros = frozenset(zeros)
        self.kernel = _cuda.Kernel(name, self._build, rule.failed)
        self._cpu_function: Callable[..., Any] | None = None
        super().__init__(name, rule, signature, launch, replace)

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

    def _build(self, cuda: Any, debug: bool) -> Any:
        options: dict[str, Any] = {"device": True}
        if not _cuda.simulating():
            options["inline"] = "always"
        if debug:
            options |= {"debug": True, "opt": False}
        copy = with_compiled_callees(self.rule.function, _cuda.device_function(cuda, options))
        given = self.function
        if given is not self.rule.function and not _cuda.simulating():
            targets = dict(given.targetoptions)
            if debug:
                targets |= {"debug": True, "opt": False}
            return type(given)(copy, targetoptions=targets)
        return cuda.jit(**({"debug": True, "opt": False} if debug else {}))(copy)

    def _prepare(self, values: Sequence[Any]) -> tuple[list[Any], list[Tensor], dict[str, int]]:
        """Kernel arguments in the kernel's order, the outputs, and the sizes."""
        sizes = self._checked_sizes(values)
        own = self.signature
        tensors = self._tensors(values)
        first = next(iter(tensors.values()))
        named: dict[str, Any] = {}
        for item, value in zip(own.inputs, values, strict=True):
            if isinstance(item, TensorArg):
                value = value.contiguous()
            elif item.kind == "float":
                value = float(value)
            named[item.name] = value
        outputs = []
        for output in own.outputs:
            result = self._allocate(output, sizes, own.output_dtype(output, tensors), first)
            if output.name in self.zeros:
                result.zero_()
            named[output.name] = result
            outputs.append(result)
        return [named[name] for name in self.rule.names], outputs, sizes

    def _kernel_args(self, values: Sequence[Any]) -> list[Any]:
        return self._prepare(values)[0]

    def _finish(self, outputs: Sequence[Tensor]) -> Any:
        results = tuple(
            value
            for output, value in zip(self.signature.outputs, outputs, strict=True)
            if not output.scratch
        )
        return results if len(results) != 1 else results[0]

    def _cpu(self, *values: Any) -> Any:
        values = self._filled(values)
        self._checked_sizes(values)
        if self._cpu_function is None:
            raise NotImplementedError(
                f"{self.name}: the tensors must be on cuda, got cpu, for which {self.rule.where} has no function. "
                "Give one with @op.cpu."
            )
        return self._cpu_function(*values)

    def _cuda(self, *values: Any) -> Any:
        args, outputs, sizes = self._prepare(self._filled(values))
        grid = self.grid(sizes)
        if 0 not in grid:
            block, shared = self.threads(sizes), self.shared(sizes)[0]
            device = outputs[0].device
            self._on_device(
                device,
                lambda: self.kernel.launch(
                    device.index,
                    args,
                    lambda: tuple(_cpu.numba_type(value) for value in args),
                    _cuda.launch_key(args),
                    grid,
                    block,
                    shared,
                    self.launch,
                    self.debug,
                ),
            )
        return self._finish(outputs)

    def _simulate(self, values: Sequence[Any]) -> Any:
        args, outputs, sizes = self._prepare(values)
        grid = self.grid(sizes)
        if 0 not in grid:
            arrays = [_cpu.as_numpy(value) for value in args]
            self.kernel.simulate(arrays, grid, self.threads(sizes), self.shared(sizes)[0])
        return self._finish(outputs)


class _Dimensions:
    """A grid, a block or a number of bytes: given as such, or as a function of some of the sizes by name."""

    def __init__(self, op: str, what: str, value: Any, signature: Signature) -> None:
        self.op = op
        self.what = what
        self.names: tuple[str, ...] = ()
        if callable(value):
            self.names = tuple(inspect.signature(value).parameters)
            known = {item.name for item in signature.scalars if item.kind == "int"}
            known |= {d.text for t in signature.tensors for d in t.dims if d.is_name}
            unknown = [name for name in self.names if name not in known]
            if unknown:
                raise ValueError(
                    f"{op}: {what} must be a function of sizes out of {sorted(known)}, got {unknown}. Rename them."
                )
            self.function = value
            self.fixed = None
        else:
            self.fixed = self._normal(value)

    def __call__(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """The three numbers for these sizes."""
        if self.fixed is not None:
            return self.fixed
        return self._normal(self.function(*[sizes[name] for name in self.names]))

    def _normal(self, value: Any) -> tuple[int, int, int]:
        numbers = (value,) if isinstance(value, int) else tuple(value)
        if not 1 <= len(numbers) <= 3 or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(
                f"{self.op}: {self.what} must be 1 to 3 whole numbers of at least 0, got {value!r}. Check it."
            )
        return (*numbers, 1, 1, 1)[:3]
