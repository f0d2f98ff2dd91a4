"""Device and dtype fixtures, and the same random numbers for every test in every order."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from moeops import _extension

# Modules that are no tests have asserts too: their errors show values. Before anything imports them.
_HELPERS = (
    path
    for path in Path(__file__).parent.rglob("*.py")
    if path.stem not in ("conftest", "__main__")
)
pytest.register_assert_rewrite(*(p.stem for p in _HELPERS if not p.stem.startswith("test_")))

from tolerances import VALUES_DTYPES

# Workers that share the cores would spend their time waiting for each other's threads; test_threads.py sets its own.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: garbage collections need not walk through it again."""
    gc.collect()
    gc.freeze()


FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def missing_cuda() -> str | None:
    """Why CUDA tests cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    if _extension.cuda_status() != "loaded":
        return f"libmoeops_cuda.so is {_extension.cuda_status()}"
    return None


def _dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    if request.param == "cuda" and (reason := missing_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda_device() -> str:
    """For tests that exist on CUDA only; give them the marker ``cuda`` too."""
    if reason := missing_cuda():
        pytest.skip(reason)
    return "cuda"


@pytest.fixture(params=FLOAT_DTYPES, ids=_dtype_id)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(
    params=VALUES_DTYPES,
    ids=lambda p: _dtype_id(p[0]) + ("_nan_filled" if p[1] else ""),
)
def values_dtype(request):
    """Every dtype, and one more run in which torch fills empty tensors with NaN: an unwritten element is seen."""
    dtype, fill = request.param
    torch.use_deterministic_algorithms(fill)
    yield dtype
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[False, True], ids=["plain", "filled"])
def filled(request):
    """The same for ops without a float type: empty integer tensors hold their largest value."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_dynamo():
    """Compile tests start without the graphs of earlier tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """Print what tests want to be in the log, from other processes too: ``record_property("log", text)``."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "log" and report.when == "call":
                    terminalreporter.section(report.nodeid)
                    terminalreporter.write_line(value)
