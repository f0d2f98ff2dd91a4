"""The elementary functions of the CPU kernels keep the error bounds that their header states."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import mpmath
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
EXACT = {
    "exponential": mpmath.exp,
    "log1p_of": mpmath.log1p,
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "erfc": mpmath.erfc,
}
# Units in the last place, as in moeops/csrc/cpu/vector_math.h.
BOUNDS = {
    "exponential": {"float32": 1.5, "float64": 1.5},
    "log1p_of": {"float32": 2.0, "float64": 2.0},
    "softplus": {"float32": 2.5, "float64": 2.5},
    "erfc": {"float32": 5.0, "float64": 6.0},
}
RANGES = {  # to the last results above zero, denormal ones included
    "exponential": {"float32": (-104.5, 88.72), "float64": (-746.0, 709.78)},
    "log1p_of": {"float32": (0.0, 1.0), "float64": (0.0, 1.0)},
    "softplus": {"float32": (-104.5, 104.5), "float64": (-746.0, 746.0)},
    "erfc": {"float32": (-6.0, 10.2), "float64": (-6.0, 27.3)},
}
LIMITS = {
    "exponential": {float("inf"): float("inf"), float("-inf"): 0.0, 0.0: 1.0, -0.0: 1.0},
    "log1p_of": {0.0: 0.0},
    "softplus": {float("inf"): float("inf"), float("-inf"): 0.0},
    "erfc": {float("inf"): 0.0, float("-inf"): 2.0, 0.0: 1.0, -0.0: 1.0},
}
# Without and with fused multiply-adds, as the clones of the kernels are compiled.
TARGETS = {"plain": [], "fused": ["-march=x86-64-v3"]}


@pytest.fixture(scope="module", params=TARGETS)
def library(request, tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("a C++ compiler is not installed")
    if request.param == "fused" and " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor has no fused multiply-add")
    target = tmp_path_factory.mktemp("vector_math") / "libvector_math.so"
    options = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
    source = ROOT / "tests" / "csrc" / "vector_math.cpp"
    include = ROOT / "moeops" / "csrc"
    subprocess.run(
        [
            *compiler.split(),
            *options,
            *TARGETS[request.param],
            f"-I{include}",
            source,
            "-o",
            target,
        ],
        check=True,
    )
    return ctypes.CDLL(str(target))


def apply(library, name, x):
    y = torch.empty_like(x)
    function = getattr(library, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(x.numel()))
    return y


def worst_error(name, x, y):
    """The largest distance to the exact values, in units in the last place of those."""
    info = torch.finfo(x.dtype)
    fraction = 23 if x.dtype == torch.float32 else 52
    worst = 0.0
    for argument, value in zip(x.tolist(), y.tolist(), strict=True):
        with mpmath.workdps(60):
            exact = EXACT[name](mpmath.mpf(argument))
            exponent = mpmath.frexp(max(abs(exact), mpmath.mpf(info.tiny)))[1] - 1
            unit = mpmath.ldexp(1, exponent - fraction)
            worst = max(worst, float(abs(value - exact) / unit))
    return worst


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_error_bound(name, dtype, library):
    low, high = RANGES[name][dtype]
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(6000, dtype=torch.float64, generator=generator) * (high - low) + low
    near_zero = torch.rand(3000, dtype=torch.float64, generator=generator) * 2 - 1
    tiny = torch.tensor([1e-3, 1e-8, 1e-30, torch.finfo(DTYPES[dtype]).tiny / 8])
    edges = torch.tensor([low, high, 0.46875, 0.46876, 4.0, 4.00001, 0.3465, 0.3467])
    x = torch.cat([uniform, near_zero.clamp(low, high), tiny, edges.clamp(low, high)])
    x = x.to(DTYPES[dtype])
    worst = worst_error(name, x, apply(library, name, x))
    assert worst <= BOUNDS[name][dtype], f"{name} in {dtype}: {worst:.2f} units in the last place"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_limits_and_nan(name, dtype, library):
    points = torch.tensor(list(LIMITS[name]), dtype=DTYPES[dtype])
    assert apply(library, name, points).tolist() == list(LIMITS[name].values())
    assert apply(library, name, torch.full((9,), float("nan"), dtype=points.dtype)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_and_underflow(dtype, library):
    info = torch.finfo(DTYPES[dtype])
    largest = torch.tensor([info.max], dtype=torch.float64).log()
    x = torch.cat([largest * 1.001, largest * 2, -largest * 1.2, -largest * 9])
    assert apply(library, "exponential", x.to(DTYPES[dtype])).tolist() == [
        float("inf"),
        float("inf"),
        0.0,
        0.0,
    ]
    assert apply(library, "erfc", torch.tensor([30.0, -30.0], dtype=DTYPES[dtype])).tolist() == [
        0.0,
        2.0,
    ]
