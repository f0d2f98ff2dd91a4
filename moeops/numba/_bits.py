"""bfloat16 in block kernels: the kernel sees the bits as uint16, and these two functions read and write them."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeops.numba._rules import INTRINSIC


def widen(value: Any) -> Any:
    """Read an element in a block kernel: float32 from bfloat16 bits, float16 and float32, float64 from float64.

    Works inside kernels of ``moeops.numba.block_kernel`` only, on CUDA and in the simulator.

    Example:
        >>> float(widen(np.uint16(0x3FC0)))
        1.5
    """
    if isinstance(value, np.uint16):
        return (np.asarray(value, dtype=np.uint32) << np.uint32(16)).view(np.float32)[()]
    return value if isinstance(value, np.float64) else np.float32(value)


def narrow(value: Any, array: Any) -> Any:
    """Convert a number to the element type of ``array``, to nearest even; bfloat16 for an array of bits.

    Works inside kernels of ``moeops.numba.block_kernel`` only, on CUDA and in the simulator.

    Example:
        >>> hex(narrow(1.5, np.zeros(1, dtype=np.uint16)))
        '0x3fc0'
    """
    if array.dtype != np.uint16:
        return array.dtype.type(value)
    if np.isnan(value):
        return np.uint16(0x7FC0)
    bits = int(np.asarray(value, dtype=np.float32).view(np.uint32))
    return np.uint16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)


setattr(widen, INTRINSIC, "widen")
setattr(narrow, INTRINSIC, "narrow")


def cuda_intrinsics() -> dict[str, Any]:
    """The same two as numba-cuda intrinsics: no call, no device needed to compile them."""
    from llvmlite import ir
    from numba import types
    from numba.cuda.extending import intrinsic

    int16, int32 = ir.IntType(16), ir.IntType(32)

    def constant(number: int) -> Any:
        return ir.Constant(int32, number)

    @intrinsic
    def cuda_widen(typingctx, value):
        out = types.float64 if value == types.float64 else types.float32

        def codegen(context, builder, sig, args):
            (element,) = args
            if sig.args[0] != types.uint16:
                return context.cast(builder, element, sig.args[0], sig.return_type)
            bits = builder.shl(builder.zext(element, int32), constant(16))
            return builder.bitcast(bits, ir.FloatType())

        return out(value), codegen

    @intrinsic
    def cuda_narrow(typingctx, value, array):
        def codegen(context, builder, sig, args):
            if sig.return_type != types.uint16:
                return context.cast(builder, args[0], sig.args[0], sig.return_type)
            number = context.cast(builder, args[0], sig.args[0], types.float32)
            bits = builder.bitcast(number, int32)
            odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
            rounded = builder.lshr(rounded, constant(16))
            is_nan = builder.fcmp_unordered("uno", number, number)
            return builder.trunc(builder.select(is_nan, constant(0x7FC0), rounded), int16)

        return array.dtype(value, array), codegen

    return {"widen": cuda_widen, "narrow": cuda_narrow}
