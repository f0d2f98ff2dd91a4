"""Show what an op compiles to."""

from __future__ import annotations

from typing import Any

from moeops.numba import _loops
from moeops.numba._block_op import BlockOp
from moeops.numba._ops import Op
from moeops.numba._row_op import RowOp

WHAT = ("ptx", "llvm", "asm", "source")


def inspect(op: Op, what: str, /, *args: Any, cc: tuple[int, int] = (9, 0), **kwargs: Any) -> str:
    """The code of an op for one call's types, compiled if need be; nothing is launched.

    Args:
        op: made by one of the decorators.
        what: ``"ptx"`` of the CUDA kernel (needs numba-cuda with NVRTC, no device), ``"llvm"`` or ``"asm"`` of the CPU
            loop, or ``"source"`` of the generated loop and kernel.
        args: a call's arguments, CPU tensors of the types in question; not needed for ``"source"``.
        cc: compute capability for ``"ptx"``.
        kwargs: further arguments of the call, by name.

    Raises:
        ValueError: ``what`` is unknown, or a block kernel is asked for CPU code.  RuleError: it does not compile.

    Example:
        >>> from moeops.numba.gates import naive_topk
        >>> print(inspect(naive_topk, "source").splitlines()[1])
        def loop(logits, top_k, weights, ids, __seen):
    """
    if what not in WHAT:
        raise ValueError(f"inspect: what must be one of {WHAT}, got {what!r}. Pick one of them.")
    if what == "ptx":
        return op.kernel.ptx(op.kernel_arguments(*args, **kwargs), cc)
    if isinstance(op, BlockOp):
        raise ValueError(
            f"inspect: what must be 'ptx' for the block kernel {op.name}, got {what!r}. Its source is your own."
        )
    assert isinstance(op, RowOp)
    if what == "source":
        return f"# CPU\n{op.driver.source('parallel')}\n# CUDA\n{op.driver.source('cuda')}"
    values = [_loops.as_numpy(value) for value in op.kernel_arguments(*args, **kwargs)]
    return op.driver.code(values, what)
