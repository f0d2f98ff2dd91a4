"""Row rules on the CPU: a generated loop over the rows, compiled by ``numba.njit`` with ``prange``."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numba
import numba.core.errors
import numpy as np
import torch
from torch import Tensor

from moeops._checks import debug_checks
from moeops.numba._rules import INTRINSIC, ROW, Rule, with_compiled_callees
from moeops.numba._signature import Signature

# Read once, as the compiled libraries do.
DEBUG = debug_checks()
# One at a time: Numba's fall-back threading layer (workqueue) aborts the process on concurrent parallel calls.
_PARALLEL = threading.Lock()


def _row_argument(signature: Signature, name: str) -> str:
    """What the generated loops hand to the rule for one parameter: a row, one number, or the whole."""
    if name == ROW and ROW not in signature.names:
        return "__t"
    item = next(i for i in (*signature.inputs, *signature.outputs) if i.name == name)
    if not signature.is_row(item):
        return name
    # An output [T] is an array of one, so that the rule can write into it.
    one = len(item.dims) == 1 and item in signature.outputs
    return f"{name}[__t : __t + 1]" if one else f"{name}[__t]"


def define(name: str, source: str, names: dict[str, Any]) -> Any:
    """The function ``name`` that a generated source defines.

    The only place where the library runs generated text; nothing but the signature's names, which are checked to be
    identifiers, gets into the text. A loop over ``*args`` would need no text, but numba-cuda compiles no kernel with
    ``*args`` ahead of its launch, and inlines no call that has them, as PTX without a device needs.
    """
    namespace = {"__name__": __name__, **names}
    exec(compile(source, f"<moeops.numba {name}>", "exec"), namespace)
    return namespace[name]


class RowDriver:
    """The compiled loop of one rule: parallel, serial, and with bounds checks.

    Called with NumPy arrays and numbers in the order of the signature's inputs, then outputs.
    """

    def __init__(self, rule: Rule, signature: Signature, finite: Sequence[str]) -> None:
        self.rule = rule
        self.signature = signature
        self.finite = tuple(finite)
        self._compiled: dict[str, Any] = {}

    def source(self, variant: str) -> str:
        """The generated loop, ``parallel``, ``serial`` or ``debug``, or for ``cuda`` the kernel, a thread per row."""
        names = ", ".join(self.signature.names)
        first = next(item.name for item in self.signature.tensors if self.signature.is_row(item))
        call = ", ".join(_row_argument(self.signature, name) for name in self.rule.names)
        if variant == "cuda":
            return (
                f"def kernel({names}):\n    __t = __cuda.grid(1)\n    if __t < {first}.shape[0]:\n"
                f"        __rule({call})\n"
            )
        loop = "__prange" if variant == "parallel" else "range"
        lines = [f"def loop({names}, __seen):", f"    for __t in {loop}({first}.shape[0]):"]
        if variant == "debug":
            lines.append("        __seen[1] = __t")
        for name in self.finite:
            # Any row that fails will do, so a race between threads is harmless.
            lines.append(f"        for __value in {name}[__t]:")
            lines.append("            if not __isfinite(__value):")
            lines.append("                __seen[0] = __t")
        lines.append(f"        __rule({call})")
        return "\n".join(lines) + "\n"

    def compiled(self, variant: str) -> Any:
        """The Numba dispatcher of one variant, made at its first use."""
        if variant not in self._compiled:
            options = {
                "error_model": "numpy",
                "nogil": True,
                "boundscheck": variant == "debug",
            }

            def compile_one(function: Any) -> Any:
                if hasattr(function, INTRINSIC):
                    function = {"widen": _same, "narrow": _same_like}[getattr(function, INTRINSIC)]
                return numba.njit(**options)(function)

            rule = compile_one(with_compiled_callees(self.rule.function, compile_one))
            names = {"__rule": rule, "__prange": numba.prange, "__isfinite": np.isfinite}
            loop = define("loop", self.source(variant), names)
            jit = numba.njit(parallel=variant == "parallel", **options)
            self._compiled[variant] = jit(loop)
        return self._compiled[variant]

    def __call__(self, values: Sequence[Any], *, debug: bool) -> None:
        """Run the rule on every row; raises RuleError, or RuntimeError for a value that is not finite."""
        seen = np.full(2, -1, dtype=np.int64)
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        variant = "debug" if debug else "parallel" if threads > 1 else "serial"
        try:
            loop = self.compiled(variant)
            if variant == "parallel":
                with _PARALLEL:
                    numba.set_num_threads(threads)
                    loop(*values, seen)
            else:
                loop(*values, seen)
        except numba.core.errors.NumbaError as err:
            raise self.rule.failed("the CPU", err) from err
        except Exception as err:
            raise self.rule.raised(err, int(seen[1]) if debug else None) from err
        if seen[0] >= 0:
            raise RuntimeError(
                f"{self.rule.op}: {' and '.join(self.finite)} must be finite, got NaN or infinity in row {seen[0]}. "
                "Look for a router that diverged."
            )

    def code(self, values: Sequence[Any], what: str) -> str:
        """LLVM IR (``llvm``) or assembly (``asm``) of the serial loop for arguments of these types."""
        loop = self.compiled("serial")
        signature = tuple(numba.typeof(value) for value in (*values, np.zeros(2, dtype=np.int64)))
        try:
            loop.compile(signature)
        except numba.core.errors.NumbaError as err:
            raise self.rule.failed("the CPU", err) from err
        show = loop.inspect_llvm if what == "llvm" else loop.inspect_asm
        return show(signature)


def _same(value):
    return value


def _same_like(value, array):
    return value


def numba_type(value: Tensor | int | float | bool) -> Any:
    """Numba type of a kernel argument: a C-contiguous array (bfloat16 as uint16), int64, float64 or boolean."""
    from numba import types

    if not isinstance(value, Tensor):
        numbers = {bool: types.boolean, int: types.int64, float: types.float64}
        return numbers[type(value)]
    element = numba.from_dtype(as_numpy(torch.empty(0, dtype=value.dtype)).dtype)
    return types.Array(element, value.dim(), "C")


def as_numpy(value: Any) -> Any:
    """A NumPy view of a CPU tensor, bfloat16 as the uint16 of its bits; numbers stay what they are."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(np.uint16)
    return value.numpy()
