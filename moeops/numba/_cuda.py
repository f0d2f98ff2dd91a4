"""Kernels on CUDA: compiled by numba-cuda once per device and types, launched with raw pointers on torch's stream.

Numba's own launch unpacks and checks every argument again, some 0.3 ms per call. Here the compiled function is taken
from it once, and a call packs the arguments into one prepared buffer and hands that to ``cuLaunchKernel``.
``launch="numba"`` is the plain launch, for comparison and for a numba-cuda that packs arguments in another way.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from moeops.numba import _bits
from moeops.numba._rules import INTRINSIC

LAUNCHES = ("direct", "numba")
# How numba-cuda passes an array: these members, one after the other, each in 8 bytes.
_ARRAY_MEMBERS = ("meminfo", "parent", "nitems", "itemsize", "data", "shape", "strides")
_INVALID_CONTEXT = 201
_STATIC_SHARED_LIMIT = 48 << 10
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


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
    return cuda


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
            "without it. Start python with it, or let moeops.numba.check start one."
        )
    return cuda


class Kernel:
    """One CUDA kernel in all its compiled forms.

    Args:
        op: the op's name, for messages.
        build: makes Numba's dispatcher from Numba's cuda module and whether to compile for debugging.
        failed: makes the error to raise when Numba refuses the code.
    """

    def __init__(
        self,
        op: str,
        build: Callable[[Any, bool], Any],
        failed: Callable[[str, Exception], Exception],
    ) -> None:
        self.op = op
        self.build = build
        self.failed = failed
        self._dispatchers: dict[bool, Any] = {}
        self._launchers: dict[Any, Launcher] = {}

    def dispatcher(self, cuda: Any, debug: bool = False) -> Any:
        """Numba's dispatcher, made at its first use."""
        if debug not in self._dispatchers:
            self._dispatchers[debug] = self.build(cuda, debug)
        return self._dispatchers[debug]

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

    def ptx(self, types: tuple[Any, ...], cc: tuple[int, int]) -> str:
        """PTX for a compute capability; needs libNVVM and NVRTC, no device."""
        cuda = import_cuda()
        function = self.dispatcher(cuda).py_func
        with self._explained():
            text, _ = cuda.compile_ptx(function, types, cc=cc)
        check_parameters(self.op, text, [getattr(kind, "ndim", None) for kind in types])
        return text

    def launch(
        self,
        index: int,
        args: Sequence[Any],
        types: Callable[[], tuple[Any, ...]],
        key: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        how: str,
        debug: bool,
    ) -> None:
        """Launch on torch's current stream of device ``index``, which must be the current device."""
        if how == "numba" or debug:
            self._launch_with_numba(index, args, grid, block, shared, debug)
            return
        launcher = self.launcher(index, args, types, key)
        values, _ = launcher.pack(args)
        launcher(values, grid, block, shared, torch._C._cuda_getCurrentRawStream(index))

    def launcher(
        self,
        index: int,
        args: Sequence[Any],
        types: Callable[[], tuple[Any, ...]],
        key: Any,
    ) -> Launcher:
        """The loaded function for these types, compiled at its first use."""
        launcher = self._launchers.get((index, key))
        if launcher is None:
            launcher = self._compile(index, args, types())
            self._launchers[index, key] = launcher
        return launcher

    def _compile(self, index: int, args: Sequence[Any], types: tuple[Any, ...]) -> Launcher:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.op}: the op must be called once before a CUDA graph is captured, got its first call with these "
                "types during capture. Warm it up: the kernel is compiled at its first call."
            )
        cuda = import_cuda()
        bind_context(index)
        with self._explained():
            compiled = self.dispatcher(cuda).compile(types)
        check_parameters(
            self.op, compiled.inspect_asm(None), [getattr(kind, "ndim", None) for kind in types]
        )
        function = compiled._codelibrary.get_cufunc()
        return Launcher(self.op, int(function.handle), args, index, function)

    def _launch_with_numba(
        self,
        index: int,
        args: Sequence[Any],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        debug: bool,
    ) -> None:
        cuda = import_cuda()
        if getattr(_bound, "index", None) != index:
            bind_context(index)
        stream = cuda.external_stream(torch.cuda.current_stream(index).cuda_stream)
        arrays = [_as_device_array(cuda, value) for value in args]
        with self._explained():
            self.dispatcher(cuda, debug)[grid, block, stream, shared](*arrays)

    def simulate(
        self,
        args: Sequence[Any],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
    ) -> None:
        """Run under Numba's simulator on NumPy arrays."""
        cuda = import_simulator()
        self.dispatcher(cuda)[grid, block, 0, shared](*args)


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

    def __call__(
        self,
        values: Sequence[Any],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
    ) -> None:
        """Launch with packed parameters on the current device."""
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


def device_function(cuda: Any, options: dict[str, Any]) -> Callable[[Any], Any]:
    """What compiles functions that a kernel calls."""
    intrinsics = {} if simulating() else _bits.cuda_intrinsics()

    def compile_one(function: Any) -> Any:
        if hasattr(function, INTRINSIC):
            return intrinsics.get(getattr(function, INTRINSIC), function)
        return cuda.jit(**options)(function)

    return compile_one


def check_parameters(op: str, ptx: str, ndims: Sequence[int | None]) -> None:
    """The compiled kernel takes its arguments as ``Launcher`` packs them."""
    entry = ptx[ptx.index(".entry") :]
    entry = entry[: entry.index(")")]
    found = re.findall(r"\.param \.(\w+)", entry)
    want = sum(1 if ndim is None else len(_ARRAY_MEMBERS) - 2 + 2 * ndim for ndim in ndims)
    if len(found) != want:
        raise RuntimeError(
            f"{op}: numba-cuda must pass an array as {', '.join(_ARRAY_MEMBERS)}, {want} parameters here, got "
            f"{len(found)}. This version packs arguments in another way; use launch='numba'."
        )


def bind_context(index: int) -> None:
    """Make torch's context current in this thread: torch skips that where the device is already the current one."""
    torch.cuda.mem_get_info(index)
    _bound.index = index


def launch_key(args: Sequence[Any]) -> tuple[Any, ...]:
    """What decides the types of a launch: the tensors' types; the numbers' types never change."""
    return tuple([value.dtype for value in args if isinstance(value, Tensor)])


def _pack_format(value: Any) -> str:
    if isinstance(value, Tensor):
        return "q" * (len(_ARRAY_MEMBERS) - 2 + 2 * value.dim())
    # A bool is read from the first byte of its 8.
    return "d" if isinstance(value, float) else "q"


def _as_device_array(cuda: Any, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return cuda.as_cuda_array(value.view(torch.uint16) if value.dtype == torch.bfloat16 else value)


def _numba_errors() -> tuple[type[Exception], ...]:
    from numba.core.errors import NumbaError

    try:
        from numba.cuda.core.errors import NumbaError as NumbaCudaError
    except ImportError:
        return (NumbaError,)
    return (NumbaError, NumbaCudaError)


_loaded: list[Any] = []
_bound = threading.local()


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
