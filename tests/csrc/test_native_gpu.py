"""What a build for this machine's GPUs compiles for, and what an op without a CUDA library says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
import torch

from moeops import _extension

SCRIPT = Path(__file__).resolve().parents[2] / "cmake" / "native_gpu.cmake"
CMAKE = shutil.which("cmake")
# CMake's check for a CUDA compiler has changed: the one on PATH, and the one that builds moeops in this environment.
CMAKES = sorted({CMAKE, shutil.which("cmake", path=str(Path(sys.executable).parent))} - {None})
NVCC, GXX = shutil.which("nvcc"), shutil.which("g++")


@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 9.0", "90a-real"),
        ("printf '9.0\\n9.0\\n'", "90a-real"),
        ("printf '8.6\\n9.0\\n10.0\\n'", "86-real;90a-real;100-real"),
        ("echo 7.5", ""),
        ("echo No devices were found", ""),
        ("echo 9.0; exit 9", ""),
    ],
)
def test_architectures_of_the_gpus(answer, expected, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\n{answer}\n")
    fake.chmod(0o755)
    result = subprocess.run(
        [CMAKE, f"-DMOEOPS_NVIDIA_SMI={fake}", "-P", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("--")]
    assert lines == ([expected] if expected else [])


def configure(cmake, folder, options, **environment):
    """CMake's first step in an environment without compilers of the user's choice but those given."""
    kept = {n: v for n, v in os.environ.items() if n not in ("CUDAHOSTCXX", "CXX")}
    options = ("-DMOEOPS_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}", *options)
    options += (f"-DCMAKE_CXX_COMPILER={GXX}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    command = [cmake, "-S", str(SCRIPT.parents[1]), "-B", str(folder), *options]
    return subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, timeout=120, check=False
    )


def make_compiler(folder, before="true"):
    """A g++ that runs a line of shell first."""
    compiler = folder / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\n{before}\nexec {GXX} "$@"\n')
    compiler.chmod(0o755)
    return compiler


needs_compilers = pytest.mark.skipif(
    not (CMAKES and NVCC and GXX), reason="cmake, nvcc and g++ are needed"
)


@needs_compilers
@pytest.mark.parametrize("chosen", [(), ("-DCMAKE_CUDA_HOST_COMPILER",)], ids=["cxx", "chosen"])
@pytest.mark.parametrize("cmake", CMAKES)
def test_both_libraries_have_one_compiler(cmake, chosen, tmp_path):
    """nvcc prefers the g++ on PATH, which may be another one than that of the CPU library."""
    other = make_compiler(tmp_path)
    host = shutil.which("gcc") if chosen else GXX
    path = f"{other.parent}:{os.environ['PATH']}"
    build = tmp_path / "build"
    done = configure(cmake, build, [f"{option}={host}" for option in chosen], PATH=path)
    assert done.returncode == 0, done.stderr
    (found,) = build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")
    text = found.read_text()
    assert f'set(CMAKE_CUDA_HOST_COMPILER "{host}")' in text
    assert str(other) not in text
    if not chosen:
        assert f'set(CMAKE_CUDA_HOST_LINK_LAUNCHER "{GXX}")' in text


@needs_compilers
@pytest.mark.parametrize("cmake", CMAKES)
def test_compiler_with_a_static_library_is_refused(cmake, tmp_path):
    """An error of a CUDA op would end the process: seen where CUDAHOSTCXX named such a compiler."""
    static = make_compiler(
        tmp_path, 'case "$1" in -print-file-name=libstdc++.so) echo libstdc++.so; exit;; esac'
    )
    done = configure(cmake, tmp_path / "build", [], CUDAHOSTCXX=str(static))
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert f"shared libstdc++.so, and {static} has only a static one" in message
    assert "for example CUDAHOSTCXX=/usr/bin/g++." in message


@pytest.mark.skipif(_extension.cuda_status() == "loaded", reason="this build has the CUDA library")
@pytest.mark.parametrize(
    "op", ["topk_route", "moe_mlp_backward_data", "grouped_linear_weight_grad"]
)
def test_op_on_cuda_says_what_to_run(op):
    # The kernel that CUDA tensors are dispatched to; a CPU build of torch has none to call it with.
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    overload = getattr(torch.ops.moeops, op).default
    zeros = {"Tensor": torch.zeros(2, 2), "str": "softmax", "bool": False, "float": 1.0}
    args = [
        zeros.get(str(a.type), None if "Optional" in str(a.type) else 1)
        for a in overload._schema.arguments
        if not a.kwarg_only
    ]
    with pytest.raises(RuntimeError, match=f"^{op}: tensors must be on the CPU") as error:
        overload.redispatch(on_cuda, *args)
    assert _extension.cuda_status() in str(error.value)


def test_not_built_names_the_command(monkeypatch):
    monkeypatch.setattr(_extension, "_loaded", {})
    monkeypatch.setattr(_extension, "_load", lambda path, built_with: None)
    monkeypatch.setattr(_extension, "_refuse_cuda", lambda: None)
    monkeypatch.setattr(_extension, "_cuda_status", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    build = _extension._import_build_module()
    monkeypatch.setattr(
        _extension,
        "_import_build_module",
        lambda: type(
            "Build",
            (),
            {
                "__file__": build.__file__,
                "build_info": staticmethod(lambda: {"with_cuda": False, "torch": "2.13"}),
            },
        ),
    )
    _extension.load()
    assert "make build MOEOPS_CUDA=ON" in _extension.cuda_status()
    assert "cmake.define.MOEOPS_CUDA=ON" in _extension.cuda_status()
