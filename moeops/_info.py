"""What this installation is made of and whether it works: the text of ``python -m moeops info``."""

from __future__ import annotations

import platform
import re
from importlib import import_module, metadata
from pathlib import Path

import torch

import moeops
from moeops import _extension

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def report() -> tuple[str, list[str]]:
    """Describe the installation.

    Returns:
        A text of several lines, and the problems found, one sentence each; none means that everything that should
        work here does. CUDA is not initialised on a machine without a usable GPU.
    """
    problems: list[str] = []
    sections = [
        _versions(problems),
        ["libraries", *_libraries()],
        ["GPUs", *_gpus(problems)],
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
