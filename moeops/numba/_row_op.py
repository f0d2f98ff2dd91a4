"""Ops made of a rule over one row: the loop on the CPU, a thread per row on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks
from moeops.numba import _cpu, _cuda
from moeops.numba._ops import Op
from moeops.numba._rules import Rule, with_compiled_callees
from moeops.numba._signature import Signature, TensorArg

_HALVES = (torch.bfloat16, torch.float16)
_MAX_PLANS = 256  # per op


class _Plan(NamedTuple):
    """What a CUDA call needs and sizes, types and numbers decide, found out and checked at the first such call."""

    device: torch.device
    launcher: _cuda.Launcher
    values: list[Any]  # packed parameters, addresses to be filled in
    addresses: list[int]  # their places: inputs in the order of the call, then outputs
    outputs: list[tuple[torch.Size, torch.dtype]]
    finals: list[torch.dtype]
    grid: tuple[int, int, int]


def _named(signature: Signature, name: str) -> TensorArg:
    return next(item for item in signature.tensors if item.name == name)


class RowOp(Op):
    """An op made of a rule that sees one row at a time; see ``moeops.numba.row_kernel``."""

    def __init__(
        self,
        name: str,
        rule: Rule,
        signature: Signature,
        *,
        finite: Sequence[str] = (),
        fastmath: bool = False,
        threads: int = 128,
        launch: str = "direct",
        replace: bool = False,
    ) -> None:
        _checks.check_int(name, "threads", threads, 1, "Use 128.")
        if threads > 1024:
            raise ValueError(
                f"{name}: threads must be at most 1024, got {threads}. Use a multiple of 32."
            )
        rows = [item.name for item in signature.tensors if signature.is_row(item)]
        for item in finite:
            if item not in rows or len(_named(signature, item).dims) != 2:
                raise ValueError(
                    f"{name}: finite must name inputs with rows and columns, got {item!r}. They are {rows}."
                )
        self.score: str | None = None
        self.scale: str | float = 1.0
        self.finite = tuple(finite)
        self.row_threads = threads
        self.fastmath = fastmath
        self.driver = _cpu.RowDriver(rule, signature, finite, fastmath)
        self.kernel = _cuda.Kernel(name, self._build, rule.failed)
        self._plans: dict[tuple[Any, ...], _Plan] = {}
        super().__init__(name, rule, signature, launch, replace)

    def kernel_source(self) -> str:
        """The generated CUDA kernel: a thread per row."""
        names = ", ".join(self.signature.names)
        first = next(item.name for item in self.signature.tensors if self.signature.is_row(item))
        call = ", ".join(_cpu.row_argument(self.signature, name) for name in self.rule.names)
        return (
            f"def kernel({names}):\n    __t = __cuda.grid(1)\n    if __t < {first}.shape[0]:\n"
            f"        __rule({call})\n"
        )

    def _build(self, cuda: Any, debug: bool) -> Any:
        # Inlined before typing, so that PTX can be made without a device.
        options: dict[str, Any] = {"device": True, "fastmath": self.fastmath and not debug}
        if not _cuda.simulating():
            options["inline"] = "always"
        if debug:
            options |= {"debug": True, "opt": False}
        compile_one = _cuda.device_function(cuda, options)
        rule = compile_one(with_compiled_callees(self.rule.function, compile_one))
        namespace = {"__rule": rule, "__cuda": cuda, "__name__": __name__}
        code = compile(self.kernel_source(), f"<moeops.numba kernel of {self.name}>", "exec")
        exec(code, namespace)
        del options["device"]
        options.pop("inline", None)
        return cuda.jit(**options)(namespace["kernel"])

    def _prepare(
        self, values: Sequence[Any]
    ) -> tuple[list[Any], list[Tensor], list[torch.dtype], int]:
        """Kernel arguments (inputs, then outputs), the outputs, their final types, and the number of rows."""
        sizes = self._checked_sizes(values)
        own = self.signature
        tensors = self._tensors(values)
        first = next(iter(tensors.values()))
        args: list[Any] = []
        for item, value in zip(own.inputs, values, strict=True):
            if isinstance(item, TensorArg):
                if value.dtype in _HALVES:
                    value = value.float()  # rules compute in float32: the cast is at the boundary
                value = value.contiguous()
            elif item.kind == "float":
                value = float(value)
            args.append(value)
        outputs, finals = [], []
        for output in own.outputs:
            final = own.output_dtype(output, tensors)
            dtype = torch.float32 if final in _HALVES else final
            outputs.append(self._allocate(output, sizes, dtype, first))
            finals.append(final)
        return args + outputs, outputs, finals, sizes[own.row_dim]

    def _finish(self, outputs: Sequence[Tensor], finals: Sequence[torch.dtype]) -> Any:
        results = tuple(
            value if value.dtype == final else value.to(final)
            for output, value, final in zip(self.signature.outputs, outputs, finals, strict=True)
            if not output.scratch
        )
        return results if len(results) != 1 else results[0]

    def _cpu(self, *values: Any) -> Any:
        args, outputs, finals, rows = self._prepare(self._filled(values))
        if rows:
            self.driver([_cpu.as_numpy(value) for value in args], debug=self.debug)
        return self._finish(outputs, finals)

    def _cuda(self, *values: Any) -> Any:
        values = self._filled(values)
        repeats = self.launch == "direct" and not self.debug and not self.poison
        key = tuple([(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in values])
        plan = self._plans.get(key) if repeats else None
        if plan is not None:
            return self._repeat(plan, values)
        args, outputs, finals, rows = self._prepare(values)
        if rows:
            if self.debug:
                self._check_finite(values)
            device = outputs[0].device
            grid = ((rows + self.row_threads - 1) // self.row_threads, 1, 1)
            self._on_device(device, lambda: self._launch(device.index, args, grid))
            if repeats:
                if len(self._plans) >= _MAX_PLANS:
                    self._plans.clear()
                self._plans[key] = self._plan(device, args, outputs, finals, grid)
        return self._finish(outputs, finals)

    def _launch(self, index: int, args: list[Any], grid: tuple[int, int, int]) -> None:
        self.kernel.launch(
            index,
            args,
            lambda: tuple(_cpu.numba_type(value) for value in args),
            _cuda.launch_key(args),
            grid,
            (self.row_threads, 1, 1),
            0,
            self.launch,
            self.debug,
        )

    def _plan(
        self,
        device: torch.device,
        args: list[Any],
        outputs: list[Tensor],
        finals: list[torch.dtype],
        grid: tuple[int, int, int],
    ) -> _Plan:
        def types() -> tuple[Any, ...]:
            return tuple(_cpu.numba_type(value) for value in args)

        launcher = self.kernel.launcher(device.index, args, types, _cuda.launch_key(args))
        values, addresses = launcher.pack(args)
        shapes = [(value.shape, value.dtype) for value in outputs]
        return _Plan(device, launcher, values, addresses, shapes, finals, grid)

    def _repeat(self, plan: _Plan, values: Sequence[Any]) -> Any:
        """A call with the sizes, types and numbers of an earlier one: only the addresses are new."""
        inputs = [value for value in values if isinstance(value, Tensor)]
        tensors = [
            (value.float() if value.dtype in _HALVES else value).contiguous() for value in inputs
        ]
        outputs = [
            torch.empty(shape, dtype=dtype, device=plan.device) for shape, dtype in plan.outputs
        ]
        packed = plan.values.copy()
        for place, tensor in zip(plan.addresses, (*tensors, *outputs), strict=True):
            packed[place] = tensor.data_ptr()
        block = (self.row_threads, 1, 1)
        stream = torch._C._cuda_getCurrentRawStream(plan.device.index)
        self._on_device(plan.device, lambda: plan.launcher(packed, plan.grid, block, 0, stream))
        return self._finish(outputs, plan.finals)

    def _check_finite(self, values: Sequence[Any]) -> None:
        for name, value in self._tensors(values).items():
            if name in self.finite and not bool(torch.isfinite(value).all()):
                raise RuntimeError(
                    f"{self.name}: {name} must be finite, got NaN or infinity. Look for a router that diverged."
                )

    def _kernel_args(self, values: Sequence[Any]) -> list[Any]:
        return self._prepare(values)[0]

    def _simulate(self, values: Sequence[Any]) -> Any:
        args, outputs, finals, rows = self._prepare(values)
        if rows:
            # The simulator starts a Python thread per CUDA thread.
            block = min(self.row_threads, rows, 8)
            self.kernel.simulate(
                [_cpu.as_numpy(value) for value in args],
                ((rows + block - 1) // block, 1, 1),
                (block, 1, 1),
                0,
            )
        return self._finish(outputs, finals)
