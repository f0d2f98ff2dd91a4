"""Ops made of a rule over one row: the loop on the CPU, a thread per row on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops.numba import _launch, _loops
from moeops.numba._backward import backward_signature
from moeops.numba._ops import Op
from moeops.numba._rules import Rule, with_compiled_callees
from moeops.numba._signature import Signature

# Rules compute in float32.
_CASTS = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def add_backward(op: Op, rule: Callable[..., Any]) -> RowOp:
    """Decorator ``op.backward``: the gradient as another row rule, compiled like the first.

    Its parameters are a choice of ``grad_<output>`` (float outputs, zeros where there is no gradient),
    ``grad_<input>`` (what it writes, one row each), and the op's own inputs and outputs.

    Returns:
        The op ``<name>_backward`` that it becomes.

    Raises:
        TypeError: a parameter is none of these.  ValueError: it writes no gradient, or one of a whole tensor.
    """
    own = op.signature
    name = f"{op.name}_backward"
    signature = backward_signature(name, own, rule)
    backward = RowOp(name, rule, signature, threads=op.row_threads, replace=op.replaced)
    written = [output.name.removeprefix("grad_") for output in signature.outputs]

    def gradient(grads, inputs, outputs):
        known = {**inputs, **outputs}
        for name, grad in grads.items():
            known[f"grad_{name}"] = torch.zeros_like(outputs[name]) if grad is None else grad
        results = backward(*(known[item.name] for item in signature.inputs))
        results = (results,) if isinstance(results, Tensor) else results
        return dict(zip(written, results, strict=True))

    needed = {item.name for item in signature.tensors}
    # The shape of an output is needed where its gradient may be missing.
    needed |= {o.name for o in own.returned if own.is_float(o) and f"grad_{o.name}" in needed}
    op._set_gradient(gradient, tuple(name for name in own.tensor_names if name in needed))
    return backward


class RowOp(Op):
    """An op made of a rule that sees one row at a time; see ``moeops.numba.row_kernel``."""

    cast = _CASTS
    backward = add_backward

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        signature: Signature,
        *,
        finite: Sequence[str] = (),
        threads: int = 128,
        replace: bool = False,
    ) -> None:
        _checks.check_int(name, "threads", threads, 1, "Use 128.")
        if threads > 1024:
            raise ValueError(
                f"{name}: threads must be at most 1024, got {threads}. Use a multiple of 32."
            )
        rows = {item.name: item for item in signature.tensors if signature.is_row(item)}
        for item in finite:
            if item not in rows or len(rows[item].dims) != 2:
                raise ValueError(
                    f"{name}: finite must name inputs with rows and columns, got {item!r}. They are {list(rows)}."
                )
        self.finite = tuple(finite)
        self.row_threads = threads
        rule = Rule.read(name, function, signature)
        self.driver = _loops.RowDriver(rule, signature, finite)
        super().__init__(name, rule, signature, signature.names, replace)

    def _build(self, cuda: Any) -> Any:
        compile_one = _launch.device_function(cuda)
        rule = compile_one(with_compiled_callees(self.rule.function, compile_one))
        names = {"__rule": rule, "__cuda": cuda}
        return cuda.jit(_loops.define("kernel", self.driver.source("cuda"), names))

    def _geometry(self, sizes: Mapping[str, int]) -> _launch.Geometry:
        rows = sizes[self.signature.row_dim]
        # The simulator starts a Python thread per CUDA thread.
        threads = min(self.row_threads, rows, 8) if _launch.simulating() else self.row_threads
        return (-(-rows // max(threads, 1)), 1, 1), (threads, 1, 1), 0

    def _run_cpu(self, *values: Any) -> Any:
        def run(arguments: list[Any], sizes: Mapping[str, int]) -> None:
            if sizes[self.signature.row_dim]:
                self.driver(arguments, debug=self.debug)

        return self._on_host(self._filled(values), run)
