"""Loads the compiled libraries, and explains a failed load."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

CPU_LIBRARY = "libmoeops_cpu.so"
CUDA_LIBRARY = "libmoeops_cuda.so"

_loaded: dict[str, Path] = {}
_cuda_status = "not loaded yet"
_refusals: torch.library.Library | None = None  # whose end would take the kernels back


def _import_build_module() -> ModuleType:
    try:
        return importlib.import_module("moeops._C")
    except ImportError as err:
        raise ImportError(
            f"moeops: the compiled module moeops._C must be importable, got: {err}. Likely causes: moeops was "
            "not built (run `pip install --no-build-isolation .` in its source tree, in an environment that has "
            "torch), it was built for another Python, or a source folder named moeops hides the installed package."
        ) from err


def _load(path: Path, built_with: str) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as err:
        reason = err.__cause__ or err
        raise ImportError(
            f"moeops: {path.name} must load into torch {torch.__version__}, got: {reason}. It was built with torch "
            f"{built_with} and needs torch 2.11 or later. Rebuild it: pip install --no-build-isolation ."
        ) from err
    _loaded[path.name] = path


def load() -> None:
    """Load the op libraries into torch: the CPU one always, the CUDA one where torch was built with CUDA."""
    global _cuda_status
    if _loaded:
        return
    build = _import_build_module()
    info = build.build_info()
    if build.__file__ is None:
        raise ImportError("moeops: moeops._C must come from a file, got none. Reinstall moeops.")
    # An editable install keeps the libraries beside _C, not beside this file.
    folder = Path(build.__file__).parent
    _load(folder / CPU_LIBRARY, info["torch"])
    if torch.version.cuda is None:
        _cuda_status = f"not loaded: torch {torch.__version__} is a build without CUDA"
    elif not info["with_cuda"]:
        _cuda_status = (
            "not built: MOEOPS_CUDA=OFF, no nvcc or, for `make`, no GPU was found when moeops was built; put nvcc on "
            "PATH and run `make build MOEOPS_CUDA=ON`, or "
            "`pip install --no-build-isolation -C cmake.define.MOEOPS_CUDA=ON .`, in the source tree"
        )
    else:
        _load(folder / CUDA_LIBRARY, info["torch"])
        _cuda_status = "loaded"
        return
    _refuse_cuda()


def _refuse_cuda() -> None:
    """Give every op a CUDA kernel that says why there is none, where torch would list its dispatch keys."""
    global _refusals
    _refusals = torch.library.Library("moeops", "FRAGMENT")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("moeops::"):
            _refusals.impl(name, _refusal(name.removeprefix("moeops::")), "CUDA")


def _refusal(op: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{op}: tensors must be on the CPU, got CUDA tensors, for which moeops has no library: it is "
            f"{_cuda_status}."
        )

    return refuse


def loaded_libraries() -> dict[str, Path]:
    """Library name to file, for those that are loaded."""
    return dict(_loaded)


def cuda_status() -> str:
    """``"loaded"``, or why the CUDA library is not there and what to do about it."""
    return _cuda_status
