"""Where ops register what torch's dispatcher finds before their kernels: gradients, and ATen for what has none.

A kernel knows values and reverse gradients. ``torch.func``'s transforms would stop at the gradients' form or, for
``jvp`` and forward-mode AD, lose the tangents without an error; ONNX has no name for an op. There an op is replaced by
what it is made of (``_decompositions.py``), which torch can differentiate in every way. The backward ops, which no
forward calls, refuse a tangent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moeops._imports import when_imported
from moeops.ops._decompositions import DECOMPOSITIONS, exporting_to_onnx


class _Library(torch.library.Library):
    """Wraps the gradients' kernels that ``torch.library.register_autograd(..., lib=LIBRARY)`` makes."""

    def impl(self, op_name: str, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        if dispatch_key == "Autograd":
            fn = _decomposing(op_name, fn)
        return super().impl(op_name, fn, dispatch_key, **options)


def _decomposing(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    decomposition = DECOMPOSITIONS.get(op)

    def run(keyset: Any, *args: Any, **options: Any) -> Any:
        if has_tangent(args):
            if decomposition is None:
                raise NotImplementedError(
                    f"{op}: arguments must have no tangent of forward-mode AD, got one. Differentiate the op whose "
                    "gradient this is; that one has tangents."
                )
            return decomposition(*args, **options)
        if decomposition is not None and _goes_to_onnx(args[0]):
            return decomposition(*args, **options)
        try:
            return kernel(keyset, *args, **options)
        except RuntimeError:
            if decomposition is None or not _runs_for_metadata():
                raise
            return decomposition(*args, **options)

    return run


def has_tangent(args: Sequence[Any]) -> bool:
    """Whether forward-mode AD is at work and one of an op's arguments has a tangent."""
    if forward_ad._current_level < 0:
        return False
    tensors = (value for value in args if isinstance(value, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _goes_to_onnx(first: Any) -> bool:
    """Whether ``torch.onnx.export`` traces: with tensors that are none, so that others need not ask for it."""
    plain = type(first) is Tensor or type(first) is torch.nn.Parameter
    return not plain and exporting_to_onnx()


def _runs_for_metadata() -> bool:
    """Whether torch runs a region on uninitialised tensors, to learn what it returns.

    It does so for ``torch.compiler.nested_compile_region`` with ``backend="eager"``. A kernel that checks values fails
    there for whatever is in memory; ATen does not, and its outputs are as good. Asked after a failure only.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_get_output_metadata_by_execution":
            return True
        frame = frame.f_back
    return False


LIBRARY = _Library("moeops", "FRAGMENT")


def refuse_second_gradient(op: str) -> None:
    """Register a gradient that raises: torch's own answer is a warning and a gradient that is silently missing."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{op}: a gradient must be differentiated once only, got a second backward pass through it. "
            "Build the layer from permute_tokens, grouped_linear and unpermute_tokens(topk_weights=None), which can "
            "be differentiated twice, or use torch.func.grad twice, which replaces ops by slow ones."
        )

    torch.library.register_autograd(f"moeops::{op}", backward, lib=LIBRARY)


def _without_gradient(op: str) -> Callable[..., Any]:
    overload = getattr(torch.ops.moeops, op).default

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    return kernel


def _decompose_what_has_no_gradient(_onnx: ModuleType) -> None:
    for op in ("count_tokens", "limit_capacity", "sort_tokens"):
        LIBRARY.impl(op, _without_gradient(op), "Autograd", with_keyset=True)
        # Where an export looks for kernels, torch remembers that there was none when something was compiled before.
        getattr(torch.ops.moeops, op).default._dispatch_cache.clear()


# Not before: a kernel in Python, which only an export needs, adds a third to the time of a small call. torch.onnx comes
# with torch's compiler, this part of it when something is exported.
when_imported("torch.onnx._internal.exporter._core", _decompose_what_has_no_gradient)
for _op, _decomposition in DECOMPOSITIONS.items():
    LIBRARY.impl(_op, _decomposition, "FuncTorchDynamicLayerFrontMode")
