"""Prototype a gate or a kernel as one Python function: it becomes a ``torch.library`` op on CPU and CUDA.

``route`` and ``row_kernel`` take a rule that sees one row and compile it with Numba for both devices;
``block_kernel`` wraps a raw ``@cuda.jit`` kernel. ``as_gate`` makes a gate for ``FMoE``; ``check``, ``bench`` and
``inspect`` are for the way from there to a native op. See docs/numba.md.
"""

try:
    from numba import njit as _njit
except ImportError as err:
    raise ImportError(
        f"moeops.numba: numba must be installed, got: {err}. Install it with pip install 'moeops[numba]', and "
        "pip install 'moeops[numba-cuda]' for CUDA."
    ) from err
del _njit

from moeops.numba import scores
from moeops.numba._bits import narrow, widen
from moeops.numba._block_op import BlockOp
from moeops.numba._checking import CheckError, CheckReport, check
from moeops.numba._code import inspect
from moeops.numba._decorators import block_kernel, route, row_kernel
from moeops.numba._gate import as_gate
from moeops.numba._row_op import RowOp
from moeops.numba._rules import RuleError
from moeops.numba._timing import Timing, bench

__all__ = [
    "BlockOp",
    "CheckError",
    "CheckReport",
    "RowOp",
    "RuleError",
    "Timing",
    "as_gate",
    "bench",
    "block_kernel",
    "check",
    "inspect",
    "narrow",
    "route",
    "row_kernel",
    "scores",
    "widen",
]
