"""Rules that several tests of moeops.numba share, and why the tests may have to be skipped."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest


def require_numba() -> None:
    """Skip a module's tests without Numba. By its metadata: this folder is called numba too."""
    try:
        importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("numba is not installed: pip install 'moeops[numba]'", allow_module_level=True)


def missing_compiler() -> str | None:
    """Why CUDA kernels cannot be compiled to PTX here, or None."""
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed: pip install 'moeops[numba-cuda]'"
    try:
        from cuda import pathfinder

        for library in ("nvrtc", "nvvm"):
            pathfinder.load_nvidia_dynamic_lib(library)
    except Exception as err:
        return f"no NVRTC or libNVVM: {str(err).splitlines()[0]}"
    return None
