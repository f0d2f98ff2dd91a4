"""CUDA tests of this folder also need numba-cuda."""

from __future__ import annotations

import importlib.util

import pytest


def _require_numba_cuda() -> None:
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed: pip install 'moeops[numba-cuda]'")


@pytest.fixture
def device(device) -> str:
    if device == "cuda":
        _require_numba_cuda()
    return device


@pytest.fixture
def cuda_device(cuda_device) -> str:
    _require_numba_cuda()
    return cuda_device
