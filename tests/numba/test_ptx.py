"""The gallery's kernels compile to PTX for sm_90 without a device, with the parameters that the launch packs."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
import torch
from numba_prototypes import missing_compiler, require_numba

require_numba()

import numba.cuda
from gallery_samples import CASES

import moeops.numba as prototype
from moeops.numba import _launch


@pytest.mark.parametrize("name", CASES)
def test_ptx_for_sm_90(name):
    if reason := missing_compiler():
        pytest.skip(reason)
    case = CASES[name]
    for dtype in case.options.get("dtypes", [torch.float32]):
        call = {
            k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in case.samples()[0].items()
        }
        ptx = prototype.inspect(case.op, "ptx", **call)
        assert ".target sm_90" in ptx
        # The rule and what it calls are inlined, bfloat16 conversions too.
        assert "call.uni" not in ptx


def test_ptx_names_the_rule_that_does_not_compile():
    if reason := missing_compiler():
        pytest.skip(reason)

    @prototype.row_kernel("test_ptx::bad", "x[T, D] -> y[T, D]: x")
    def bad(x, y):
        y[0] = torch.ones(1)

    with pytest.raises(
        prototype.RuleError, match=r"rule .*bad \(.*test_ptx.py:\d+\) must compile .* for CUDA"
    ):
        prototype.inspect(bad, "ptx", torch.ones(2, 3))


def test_numpy_that_does_not_fit_is_named(monkeypatch):
    if reason := missing_compiler():
        pytest.skip(reason)

    @prototype.row_kernel("test_ptx::double", "x[T, D] -> y[T, D]: x")
    def double(x, y):
        y[0] = x[0] + x[0]

    class Broken:
        def compile_ptx(self, *args, **kwargs):
            return np.name_of_another_numpy

        def __getattr__(self, name):
            return getattr(numba.cuda, name)

    monkeypatch.setattr(_launch, "import_cuda", Broken)
    with pytest.raises(
        RuntimeError,
        match=r"test_ptx::double: numba-cuda must .* got numba-cuda .* and numpy .*name_of_another.*pip install",
    ):
        prototype.inspect(double, "ptx", torch.ones(2, 3))


@pytest.mark.parametrize("has", [True, False], ids=["numpy-2.4", "numpy-2.5"])
def test_numpy_has_row_stack_while_numba_cuda_loads(has, monkeypatch):
    if has:
        monkeypatch.setattr(np, "row_stack", len, raising=False)
    else:
        monkeypatch.delattr(np, "row_stack", raising=False)
    _launch._import_arrays.cache_clear()
    seen = []

    def import_module(name):
        seen.append((name, np.row_stack))
        raise ImportError(name)

    monkeypatch.setattr(_launch.importlib, "import_module", import_module)
    with pytest.raises(ImportError):
        _launch._import_arrays()
    assert seen == [("numba.cuda.np.arrayobj", len if has else np.vstack)]
    assert hasattr(np, "row_stack") is has


def test_parameters_that_do_not_fit_are_refused():
    entry = ".visible .entry f(.param .u64 a, .param .u64 b) { ret; }"
    _launch.check_parameters("ns::op", entry, [1, 2.0])
    with pytest.raises(
        RuntimeError, match=r"ns::op: numba-cuda must pass an array .* 9 parameters here, got 2"
    ):
        _launch.check_parameters("ns::op", entry, [torch.ones(2, 2)])


class RecordingDriver:
    """Stands in for the driver: keeps what a launch hands over, and answers with the next of ``codes``."""

    def __init__(self, size, codes=(0,)):
        self.size = size
        self.codes = list(codes)
        self.launches = []

    def cuLaunchKernel(self, function, *rest):
        dims, stream, pointers = rest[:7], rest[7], rest[8]
        slots = [ctypes.string_at(pointers[i], 8) for i in range(self.size)]
        self.launches.append((function.value, dims, stream, slots))
        return self.codes.pop(0)

    def cuGetErrorName(self, code, name):
        name._obj.value = b"CUDA_ERROR_NAME"
        return 0


def test_launch_packs_arguments(monkeypatch):
    """Arrays as (0, 0, elements, item size, address, sizes, strides in bytes), numbers in 8 bytes each."""
    x = torch.zeros(3, 1, 4, dtype=torch.bfloat16)
    flags = torch.zeros(5, dtype=torch.bool)
    args = [x, 7, 2.5, True, flags]
    want = struct.pack(
        "=11qqdq7q",
        *(0, 0, 12, 2, x.data_ptr(), 3, 1, 4, 8, 8, 2),
        *(7, 2.5, 1),
        *(0, 0, 5, 1, flags.data_ptr(), 5, 1),
    )
    driver = RecordingDriver(len(want) // 8, codes=[0, 1, _launch._INVALID_CONTEXT, 0])
    monkeypatch.setattr(_launch, "_loaded", [driver])
    launcher = _launch.Launcher("ns::op", 0x1234, args, 0, None)
    values, addresses = launcher.pack(args)
    geometry = (2, 1, 1), (64, 1, 1), 16
    assert [values[place] for place in addresses] == [x.data_ptr(), flags.data_ptr()]
    launcher(values, geometry, 99)
    function, dims, stream, slots = driver.launches[0]
    assert (function, dims, stream) == (0x1234, (2, 1, 1, 64, 1, 1, 16), 99)
    assert b"".join(slots) == want
    with pytest.raises(
        RuntimeError,
        match=r"ns::op: .* got CUDA_ERROR_NAME .* grid \(2, 1, 1\), block \(64, 1, 1\)",
    ):
        launcher(values, geometry, 99)
    bound = []
    monkeypatch.setattr(_launch, "bind_context", bound.append)
    launcher(values, geometry, 99)
    assert bound == [0]
    assert driver.launches[3] == driver.launches[2]
