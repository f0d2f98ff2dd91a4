"""Kernels on CUDA: compiled by numba-cuda once per device and types, launched with raw pointers on torch's stream.

Numba's own launch unpacks and checks every argument again, some 0.3 ms per call. Here the compiled function is taken
from it once, and a call packs the arguments into one prepared buffer and hands that to ``cuLaunchKernel``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeops.numba import _bits
from moeops.numba._loops import numba_type
from moeops.numba._rules import INTRINSIC

Geometry = tuple[tuple[int, int, int], tuple[int, int, int], int]  # grid, block, bytes shared

# How numba-cuda passes an array: these members, one after the other, each in 8 bytes.
_ARRAY_MEMBERS = ("meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides")
_INVALID_CONTEXT = 201
_STATIC_SHARED_LIMIT = 48 << 10
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_importing = threading.Lock()


def import_cuda() -> Any:
    """numba-cuda's module; does not touch the driver."""
    try:
        import numba_cuda
        from numba import cuda
    except ImportError as err:
        raise ImportError(
            f"moeops.numba: numba-cuda must be installed to run or compile CUDA kernels, got: {err}. "
            "Install it with pip install 'moeops[numba-cuda]'."
        ) from err
    del numba_cuda
    if not simulating():
        _import_arrays()
    return cuda


@functools.cache
def _import_arrays() -> None:
    """Import what numba-cuda knows of arrays, which it would do at its first kernel.

    numba-cuda 0.30 gives ``np.row_stack`` an implementation, and NumPy 2.5 has no such function any more: it was
    another name of ``vstack``, which carries that name until the import is over.
    """
    with _importing:
        lend = not hasattr(np, "row_stack")
        if lend:
            setattr(np, "row_stack", np.vstack)  # noqa: B010 - a name that NumPy's types do not know
        try:
            importlib.import_module("numba.cuda.np.arrayobj")
        finally:
            if lend:
                delattr(np, "row_stack")


def simulating() -> bool:
    """The process runs Numba's CUDA simulator instead of CUDA."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def import_simulator() -> Any:
    """Numba's simulator module."""
    from numba import cuda

    if not simulating():
        raise RuntimeError(
            "moeops.numba: NUMBA_ENABLE_CUDASIM must be 1 before numba is imported to simulate CUDA, got a process "
            "without it. Start python with it."
        )
    return cuda


class Kernel:
    """One CUDA kernel in all its compiled forms.

    Args:
        op: the op's name, for messages.
        build: makes Numba's dispatcher from Numba's cuda module.
        failed: makes the error to raise when Numba refuses the code.
    """

    def __init__(
        self, op: str, build: Callable[[Any], Any], failed: Callable[[str, Exception], Exception]
    ) -> None:
        self.op = op
        self.build = build
        self.failed = failed
        self._dispatcher: Any = None
        self._launchers: dict[Any, Launcher] = {}

    def dispatcher(self, cuda: Any) -> Any:
        """Numba's dispatcher, made at its first use."""
        if self._dispatcher is None:
            self._dispatcher = self.build(cuda)
        return self._dispatcher

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of compiling name the rule, or the packages that do not fit each other."""
        try:
            yield
        except _numba_errors() as err:
            raise self.failed("CUDA", err) from err
        except AttributeError as err:
            if getattr(err.obj, "__name__", None) != "numpy":
                raise
            raise RuntimeError(
                f"{self.op}: numba-cuda must find the NumPy it was made for, got numba-cuda {version('numba-cuda')} "
                f"and numpy {version('numpy')}: {err}. Install the versions that fit with pip install "
                "'moeops[numba-cuda]'."
            ) from err

    def ptx(self, args: Sequence[Any], cc: tuple[int, int]) -> str:
        """PTX for arguments of these types and a compute capability; needs libNVVM and NVRTC, no device."""
        cuda = import_cuda()
        function = self.dispatcher(cuda).py_func
        with self._explained():
            text, _ = cuda.compile_ptx(function, tuple(numba_type(arg) for arg in args), cc=cc)
        check_parameters(self.op, text, args)
        return text

    def launcher(self, index: int, args: Sequence[Any]) -> Launcher:
        """The function for arguments of these types on device ``index``, compiled and loaded at its first use."""
        # The numbers' types never change.
        key = (index, *(arg.dtype for arg in args if isinstance(arg, Tensor)))
        if key not in self._launchers:
            self._launchers[key] = self._compile(index, args)
        return self._launchers[key]

    def _compile(self, index: int, args: Sequence[Any]) -> Launcher:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.op}: the op must be called once before a CUDA graph is captured, got its first call with these "
                "types during capture. Warm it up: the kernel is compiled at its first call."
            )
        cuda = import_cuda()
        bind_context(index)
        with self._explained():
            compiled = self.dispatcher(cuda).compile(tuple(numba_type(arg) for arg in args))
        check_parameters(self.op, compiled.inspect_asm(None), args)
        function = compiled._codelibrary.get_cufunc()
        return Launcher(self.op, int(function.handle), args, index, function)


class Launcher:
    """A loaded function with a prepared argument buffer."""

    def __init__(self, op: str, function: int, args: Sequence[Any], index: int, owner: Any) -> None:
        self.op = op
        self.function = ctypes.c_void_p(function)
        self.index = index
        self._owner = owner  # keeps the module loaded
        self._shared_limit = _STATIC_SHARED_LIMIT
        fmt = "".join(_pack_format(value) for value in args)
        self._pack = struct.Struct(f"={fmt}").pack_into
        self._buffer = ctypes.create_string_buffer(8 * len(fmt))
        start = ctypes.addressof(self._buffer)
        self._pointers = (ctypes.c_void_p * len(fmt))(*(start + 8 * i for i in range(len(fmt))))
        # ctypes lets other threads run during the call, and they would fill the buffer.
        self._lock = threading.Lock()
        self._driver = _driver()

    def pack(self, args: Sequence[Any]) -> tuple[list[Any], list[int]]:
        """What the kernel's parameters hold for these arguments, and which of them are the tensors' addresses."""
        values: list[Any] = []
        addresses: list[int] = []
        for value in args:
            if isinstance(value, Tensor):
                size = value.itemsize
                shape = value.shape
                addresses.append(len(values) + 4)
                values += (0, 0, value.numel(), size, value.data_ptr(), *shape)
                if len(shape) == 1:
                    values.append(size)
                else:
                    # C order, whatever torch says about dimensions of size 0 or 1.
                    strides = [size]
                    for extent in reversed(shape[1:]):
                        strides.append(strides[-1] * extent)
                    values += reversed(strides)
            else:
                values.append(value)
        return values, addresses

    def __call__(self, values: Sequence[Any], geometry: Geometry, stream: int) -> None:
        """Launch with packed parameters on the current device."""
        grid, block, shared = geometry
        if shared > self._shared_limit:
            self._raise_shared_limit(shared)
        with self._lock:
            self._pack(self._buffer, 0, *values)
            code = self._launch(grid, block, shared, stream)
            if code == _INVALID_CONTEXT:
                # This thread has not used the device yet.
                bind_context(self.index)
                code = self._launch(grid, block, shared, stream)
        if code:
            self._fail("cuLaunchKernel", code, f"grid {grid}, block {block}, {shared} bytes shared")

    def _launch(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, stream: int
    ) -> int:
        return self._driver.cuLaunchKernel(
            self.function, *grid, *block, shared, stream, self._pointers, None
        )

    def _raise_shared_limit(self, shared: int) -> None:
        """Ask for more dynamic shared memory than every kernel gets."""
        code = self._driver.cuKernelSetAttribute(
            _MAX_DYNAMIC_SHARED, shared, self.function, self.index
        )
        if code:
            self._fail("cuKernelSetAttribute", code, f"{shared} bytes shared")
        self._shared_limit = shared

    def _fail(self, call: str, code: int, what: str) -> None:
        name = ctypes.c_char_p()
        self._driver.cuGetErrorName(code, ctypes.byref(name))
        error = name.value.decode() if name.value else f"error {code}"
        raise RuntimeError(
            f"{self.op}: the launch must fit the device, got {error} from {call} with {what}. "
            "Check grid, threads and shared memory."
        )


def device_function(cuda: Any) -> Callable[[Any], Any]:
    """What compiles functions that a kernel calls: inlined before typing, so that PTX can be made without a device."""
    options = {} if simulating() else {"inline": "always"}
    intrinsics = {} if simulating() else _bits.cuda_intrinsics()

    def compile_one(function: Any) -> Any:
        if hasattr(function, INTRINSIC):
            return intrinsics.get(getattr(function, INTRINSIC), function)
        return cuda.jit(device=True, **options)(function)

    return compile_one


def check_parameters(op: str, ptx: str, args: Sequence[Any]) -> None:
    """The compiled kernel takes its arguments as ``Launcher`` packs them."""
    entry = ptx[ptx.index(".entry") :]
    entry = entry[: entry.index(")")]
    found = re.findall(r"\.param \.(\w+)", entry)
    want = sum(len(_pack_format(arg)) for arg in args)
    if len(found) != want:
        raise RuntimeError(
            f"{op}: numba-cuda must pass an array as {', '.join(_ARRAY_MEMBERS)}, {want} parameters here, got "
            f"{len(found)}. Install a version that does with pip install 'moeops[numba-cuda]'."
        )


def bind_context(index: int) -> None:
    """Make torch's context current in this thread: torch skips that where the device is already the current one."""
    torch.cuda.mem_get_info(index)


def _pack_format(value: Any) -> str:
    if isinstance(value, Tensor):
        return "q" * (len(_ARRAY_MEMBERS) - 2 + 2 * value.dim())
    # A bool is read from the first byte of its 8.
    return "d" if isinstance(value, float) else "q"


def _numba_errors() -> tuple[type[Exception], ...]:
    from numba.core.errors import NumbaError

    try:
        from numba.cuda.core.errors import NumbaError as NumbaCudaError
    except ImportError:
        return (NumbaError,)
    return (NumbaError, NumbaCudaError)


_loaded: list[Any] = []


def _driver() -> Any:
    """The driver's library, with the types of the calls made here."""
    if not _loaded:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        unsigned = ctypes.c_uint
        driver.cuLaunchKernel.argtypes = [
            ctypes.c_void_p,
            *[unsigned] * 7,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        driver.cuKernelSetAttribute.argtypes = [
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        driver.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        _loaded.append(driver)
    return _loaded[0]
