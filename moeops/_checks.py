"""Argument checks shared by all op families.

Messages read ``<op>: <argument> must be <requirement>, got <what was got>. <what to do>``. Public functions run these
in eager mode; under a compiler the fakes repeat the shape checks.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from moeops import _extension
from moeops.types import TokenPlan

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)


def debug_checks() -> bool:
    """Whether ``MOEOPS_DEBUG_CHECKS`` in the environment asks for checks of values that cost a copy to the host.

    It is on unless it is unset, empty, 0, false, no or off, in any case. Python reads it at every call; the CUDA
    library follows the same rule (``csrc/cuda/common.h``), once per process.
    """
    value = os.environ.get("MOEOPS_DEBUG_CHECKS", "")
    return value.lower() not in ("", "0", "false", "no", "off")


def describe(value: object) -> str:
    """``torch.float32 [4, 8] on cpu`` for a tensor, ``'abc' (str)`` for anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of routing weights and of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, value: object, dim: int | None) -> None:
    """``value`` is a tensor with ``dim`` dimensions (``None``: any number) on a device that has kernels."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor, got {describe(value)}. Pass a torch.Tensor."
        )
    if dim is not None and value.dim() != dim:
        raise ValueError(
            f"{op}: {name} must have {dim} dimensions, got {describe(value)}. Reshape it first."
        )
    if value.device.type == "cuda" and _extension.cuda_status() != "loaded":
        raise RuntimeError(
            f"{op}: {name} must be on a device that moeops has kernels for, got {describe(value)}. "
            f"The CUDA library is {_extension.cuda_status()}."
        )
    if value.device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"{op}: {name} must be on cpu or cuda, got {describe(value)}. Move it with .to('cuda')."
        )


def check_float(op: str, name: str, value: Tensor) -> None:
    """``value`` has one of the float types the kernels compute in."""
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {describe(value)}. Cast it with .to()."
        )


def check_ids(op: str, name: str, value: object, dim: int | None = 2) -> None:
    """``value`` is an int32 or int64 tensor with ``dim`` dimensions (``None``: any number)."""
    check_tensor(op, name, value, dim)
    assert isinstance(value, Tensor)
    if value.dtype not in ID_DTYPES:
        raise TypeError(
            f"{op}: {name} must be int32 or int64, got {describe(value)}. Cast it with {name}.to(torch.int32)."
        )


def check_like(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """``value`` has the dtype and the device of ``like``."""
    if value.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} must be {like.dtype} like {like_name}, got {describe(value)}. Cast one of them with .to()."
        )
    check_device(op, name, value, like_name, like)


def check_device(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """``value`` is on the device of ``like``."""
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name} must be on {like.device} like {like_name}, got {describe(value)}. Move one with .to()."
        )


def check_size(op: str, name: str, value: Tensor, dim: int, size: int, why: str) -> None:
    """``value`` has ``size`` entries in dimension ``dim``."""
    if value.shape[dim] != size:
        raise ValueError(
            f"{op}: {name} must have size {size} in dimension {dim} ({why}), got {describe(value)}. "
            "Check the arguments it has to fit."
        )


def check_int(op: str, name: str, value: object, minimum: int, hint: str) -> None:
    """``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {describe(value)}. {hint}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}. {hint}")


def check_offsets(op: str, value: object, like_name: str, like: Tensor) -> None:
    """``expert_offsets`` is ``[E + 1]`` int32 on the device of ``like``."""
    check_tensor(op, "expert_offsets", value, 1)
    assert isinstance(value, Tensor)
    if value.dtype != torch.int32:
        raise TypeError(
            f"{op}: expert_offsets must be int32, got {describe(value)}. Build it with moeops.sort_tokens."
        )
    if value.shape[0] < 2:
        raise ValueError(
            f"{op}: expert_offsets must have E + 1 >= 2 entries, got {describe(value)}. "
            "Build it with moeops.sort_tokens."
        )
    check_device(op, "expert_offsets", value, like_name, like)


def check_plan(op: str, plan: object, like_name: str, like: Tensor) -> None:
    """``plan`` is a TokenPlan that lives with ``like``; its numbers of rows and of pairs are independent."""
    if not (isinstance(plan, tuple) and len(plan) == 3):
        raise TypeError(
            f"{op}: plan must be a moeops.TokenPlan, got {describe(plan)}. Build it with moeops.sort_tokens."
        )
    plan = TokenPlan(*plan)
    check_tensor(op, "row_to_pair", plan.row_to_pair, 1)
    check_tensor(op, "pair_to_row", plan.pair_to_row, 2)
    for name, value in (("row_to_pair", plan.row_to_pair), ("pair_to_row", plan.pair_to_row)):
        if value.dtype != torch.int32:
            raise TypeError(
                f"{op}: {name} must be int32, got {describe(value)}. Build it with moeops.sort_tokens."
            )
        check_device(op, name, value, like_name, like)
    check_offsets(op, plan.expert_offsets, like_name, like)


def fake_check(condition: bool | torch.SymBool, message: str) -> None:
    """A shape check inside a fake kernel: holds for symbolic sizes, recorded where it cannot be decided."""
    torch._check(condition, lambda: message)
