"""What this installation is made of and whether it works: the text of ``python -m moeops info``."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import import_module, metadata
from pathlib import Path

import torch

import moeops
from moeops import _extension

DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Distributions that parts of moeops work with, their oldest versions, and what pip installs for them.
PROJECTS = (
    ("transformers", "5.8", "moeops[transformers]"),
    ("peft", "0.20", "moeops[peft]"),
    ("megatron-core", "0.16", "moeops[megatron]"),
    ("torchtitan", "0.3", "torchtitan"),
    ("onnxscript", "0.6", "moeops[onnx]"),
)


def report() -> tuple[str, list[str]]:
    """Describe the installation.

    Returns:
        A text of several lines, and the problems found, one sentence each; none means that everything that should
        work here does. Packages that are not installed and the reasons for slower kernels are in the text alone. CUDA
        is not initialised on a machine without a usable GPU.
    """
    problems: list[str] = []
    sections = [
        _versions(problems),
        ["libraries", *_libraries()],
        ["GPUs", *_gpus(problems)],
        ["what is fast here", *_cpu_speed(), *_gpu_speed(), *_compilers(), *_numba()],
        ["other projects", *_projects()],
        _ops(problems),
    ]
    if not problems:  # a broken installation has said enough
        problems += _try_out("cpu")
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                problems += _try_out(f"cuda:{index}")
    return "\n".join(line for section in sections for line in section), problems


def _row(name: str, text: str) -> str:
    return f"  {name:<18} {text}"


def _versions(problems: list[str]) -> list[str]:
    build = import_module("moeops._C").build_info()
    cuda = f"CUDA {build['cuda_compiler']} for {build['cuda_architectures']}"
    try:
        installed = metadata.version("moeops")
    except metadata.PackageNotFoundError:
        installed = moeops.__version__  # on the path, not installed: nothing to compare with
    if build["quick_cuda"]:
        cuda += ", slow kernels of MOEOPS_QUICK_CUDA=ON: for checks, not for use"
    if installed != moeops.__version__:
        problems.append(
            f"moeops: the installed version must be {moeops.__version__} like the Python files, got {installed}. "
            "Reinstall it: pip install --no-build-isolation ."
        )
    return [
        "versions",
        _row("moeops", f"{moeops.__version__} in {Path(moeops.__file__).parent}"),
        _row(
            "built with",
            f"torch {build['torch']}, {build['cxx_compiler']}, {cuda if build['with_cuda'] else 'no CUDA'}",
        ),
        _row("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        _row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]


def _libraries() -> list[str]:
    loaded = _extension.loaded_libraries()
    rows = [_row(name, str(path)) for name, path in loaded.items()]
    if _extension.CUDA_LIBRARY not in loaded:
        rows.append(_row(_extension.CUDA_LIBRARY, _extension.cuda_status()))
    return rows


def _gpus(problems: list[str]) -> list[str]:
    driver = _driver_version()
    rows = [_row("driver", driver)] if driver else []
    if not torch.cuda.is_available():
        return [*rows, _row("none", "usable from torch")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        rows.append(_row(f"cuda:{index}", text))
    if _extension.CUDA_LIBRARY not in _extension.loaded_libraries():
        problems.append(
            f"{_extension.CUDA_LIBRARY}: must be loaded on a machine with a GPU, got: {_extension.cuda_status()}."
        )
    return rows


def _driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, asked of the kernel, not of CUDA."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def _cpu_speed() -> list[str]:
    threads, cores = torch.get_num_threads(), _usable_cores()
    text = f"yes, {threads} threads on {cores} cores, vector code for {torch.backends.cpu.get_cpu_capability()}"
    if threads < cores:
        text += "; torch.set_num_threads or OMP_NUM_THREADS gives them more"
    return [_row("CPU ops", text)]


def _usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _gpu_speed() -> list[str]:
    """Which kernels run on which GPU, and why no better ones."""
    if not torch.cuda.is_available():
        return [_row("CUDA ops", "no, torch sees no GPU")]
    if _extension.CUDA_LIBRARY not in _extension.loaded_libraries():
        return [_row("CUDA ops", f"no, the library is {_extension.cuda_status()}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        reason = _no_hopper(torch.cuda.get_device_properties(index).major)
        text = (
            f"general kernels: {reason}"
            if reason
            else "Hopper kernels for half types, general ones else"
        )
        rows.append(_row(f"cuda:{index} ops", text))
    return rows


def _no_hopper(capability: int) -> str | None:
    """Why nothing runs in the Hopper kernels on a GPU of this major capability: the rules of ``hopper/refusals.cu``."""
    build = import_module("moeops._C").build_info()
    if os.environ.get("MOEOPS_KERNELS") == "general":
        return "MOEOPS_KERNELS is general"
    if capability != 9:
        return "wgmma exists on compute capability 9 only"
    if "90a" not in build["cuda_architectures"]:
        return f"built for {build['cuda_architectures']}, without 90a. Rebuild with MOEOPS_CUDA=ON"
    return None


def _compilers() -> list[str]:
    """What ``torch.compile`` needs beside torch: a C++ compiler for CPU code, Triton for a GPU's."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    compiler = shutil.which(name)
    text = (
        f"yes, with {compiler}" if compiler else f"no {name}: install one, or name another in CXX"
    )
    rows = [_row("compiled on CPU", text)]
    if torch.cuda.is_available():
        triton = _version("triton")
        text = f"yes, with triton {triton}" if triton else "no Triton: pip install triton"
        rows.append(_row("compiled on CUDA", text))
    return rows


def _numba() -> list[str]:
    """Whether prototypes compile: Numba refuses some versions of numpy, and says so when it is imported."""
    advice = "pip install 'moeops[numba]'"
    installed = _version("numba")
    if installed is None:
        return [_row("Numba on CPU", f"missing: {advice}")]
    try:
        import_module("numba")
    except ImportError as err:
        return [_row("Numba on CPU", f"numba {installed} does not import: {err}. {advice}")]
    rows = [_row("Numba on CPU", f"yes, numba {installed}")]
    if torch.cuda.is_available():
        cuda = _version("numba-cuda")
        text = f"yes, numba-cuda {cuda}" if cuda else "missing: pip install 'moeops[numba-cuda]'"
        rows.append(_row("Numba on CUDA", text))
    return rows


def _projects() -> list[str]:
    rows = []
    for name, oldest, package in PROJECTS:
        installed = _version(name)
        text = f"missing: pip install '{package}'" if installed is None else installed
        if installed is not None and _numbers(installed) < _numbers(oldest):
            text = (
                f"{installed} is too old: pip install --upgrade '{package}' for {oldest} or newer"
            )
        rows.append(_row(name, text))
    return rows


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, without what follows it: (0, 19) of 0.19rc1."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _ops(problems: list[str]) -> list[str]:
    """Every op with its schema; one without a kernel for a loaded library is a problem."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {"CPU": _extension.CPU_LIBRARY, "CUDA": _extension.CUDA_LIBRARY}
    loaded = _extension.loaded_libraries()
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("moeops::"))
    rows = [f"ops ({len(names)})"]
    for name in names:
        rows += [f"  {schema}" for schema in torch._C._jit_get_schemas_for_operator(name)]
        # Made of other ops, or Python, on every device.
        if any(has_kernel(name, f"Composite{kind}Autograd") for kind in ("Implicit", "Explicit")):
            continue
        problems += [
            f"{name}: must have a {key} kernel, got none in {library}. Rebuild moeops."
            for key, library in keys.items()
            if library in loaded and not has_kernel(name, key)
        ]
    if not names:
        problems.append("torch.ops.moeops: must hold ops, got none. Rebuild moeops.")
    return rows


def _try_out(device: str) -> list[str]:
    """Run a few ops on ``device``: a driver or an architecture that does not fit shows only then."""
    try:
        weights, ids = moeops.topk_route(torch.tensor([[0.0, 2.0, 1.0]], device=device), 2)
        plan = moeops.sort_tokens(ids, 3)
        rows = moeops.permute_tokens(torch.ones(1, 4, device=device), plan)
        y = moeops.unpermute_tokens(rows, plan, weights)
        offsets = plan.expert_offsets.tolist()
    except RuntimeError as err:
        return [f"{device}: must run moeops' ops, got: {err}"]
    if offsets != [0, 0, 1, 2] or not torch.allclose(y, torch.ones_like(y)):
        return [
            f"{device}: must compute what it should, got {offsets} and {y.tolist()}. Rebuild moeops."
        ]
    return []
