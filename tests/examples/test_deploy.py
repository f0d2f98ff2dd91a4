"""A compiled package runs where there is no moeops but its libraries: from C++, and from Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeops import FMoETransformerMLP, _extension
from moeops.gates import DeepSeekV3Gate

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[2] / "examples" / "deploy" / "main.cpp"
T, D = 5, 8


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package, the tokens that the program makes up, and what the model says to them."""
    torch.manual_seed(0)
    model = FMoETransformerMLP(4, D, 16, activation="swiglu", gate=DeepSeekV3Gate).eval()
    path = tmp_path_factory.mktemp("deploy") / "model.pt2"
    with torch.no_grad():
        tokens = torch.export.Dim("tokens", max=4096)
        program = torch.export.export(model, (torch.randn(6, D),), dynamic_shapes=({0: tokens},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        x = torch.arange(float(T * D)).div(T * D).view(T, D)
        return path, x, model(x)


def cpu_library() -> str:
    return str(_extension.loaded_libraries()[_extension.CPU_LIBRARY])


def run(*command: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (expect == 0), done.stderr
    return done


def test_python_without_moeops(package, tmp_path):
    path, x, want = package
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys, torch
torch.ops.load_library({cpu_library()!r})
model = torch._inductor.aoti_load_package({str(path)!r})
torch.save(model(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "y.pt")!r})
assert "moeops" not in sys.modules
"""
    run(sys.executable, "-c", code)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), want)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_program_in_cpp(package, tmp_path):
    path, _, want = package
    root = Path(torch.__file__).parent
    program = str(tmp_path / "deploy")
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    run("g++", "-std=c++20", *include, str(SOURCE), "-o", program, *link, *libraries)
    printed = run(program, cpu_library(), str(path), str(T), str(D)).stdout
    rows = [[float(number) for number in line.split()] for line in printed.splitlines()]
    torch.testing.assert_close(torch.tensor(rows), want)
    failed = run(program, "/nowhere/libmoeops_cpu.so", str(path), str(T), str(D), expect=1)
    assert "cannot open /nowhere/libmoeops_cpu.so" in failed.stderr
