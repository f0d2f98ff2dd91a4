"""python -m moeops info: what it lists, and that a broken installation says so with exit code 1."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeops
from moeops import _extension, _info
from moeops.__main__ import main


def run_info(*, cwd, extra_path=None) -> subprocess.CompletedProcess:
    code = "import sys, runpy; sys.argv[1:] = ['info']; runpy.run_module('moeops', run_name='__main__')"
    if extra_path:
        # An editable install has an import hook that would find the real package first.
        code = f"import sys; sys.meta_path[:] = sys.meta_path[-3:]; sys.path.insert(0, {extra_path!r}); {code}"
        command = [sys.executable, "-c", code]
    else:
        command = [sys.executable, "-m", "moeops", "info"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_names_versions_libraries_and_every_op(tmp_path):
    result = run_info(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"moeops             {moeops.__version__}" in result.stdout
    assert f"torch              {torch.__version__}" in result.stdout
    assert str(_extension.loaded_libraries()["libmoeops_cpu.so"]) in result.stdout
    assert _extension.cuda_status() in result.stdout or "libmoeops_cuda.so" in result.stdout
    for row in ("what is fast here", "  CPU ops            yes, ", "  compiled on CPU    "):
        assert row in result.stdout
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("moeops::")]
    assert len(names) >= 12
    for name in names:
        (schema,) = torch._C._jit_get_schemas_for_operator(name)
        assert str(schema) in result.stdout


def test_does_not_start_cuda_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    code = "import torch, moeops._info as i; i.report(); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_missing_library_prints_the_cause(tmp_path):
    source = Path(moeops.__file__).parent
    shutil.copytree(
        source, tmp_path / "moeops", ignore=shutil.ignore_patterns("csrc", "*.so", "__pycache__")
    )
    result = run_info(cwd=tmp_path, extra_path=str(tmp_path))
    assert result.returncode == 1
    assert "moeops._C must be importable" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


def test_op_without_kernel_is_a_problem(monkeypatch, capsys):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

    def without_pad(name, key):
        return name != "moeops::pad_rows" and has_kernel(name, key)

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", without_pad)
    assert main(["info"]) == 1
    assert "moeops::pad_rows: must have a CPU kernel" in capsys.readouterr().err


def test_wrong_results_are_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(moeops, "unpermute_tokens", lambda rows, plan, weights: rows[:1] * 2)
    assert main(["info"]) == 1
    assert "cpu: must compute what it should" in capsys.readouterr().err


def test_failing_kernel_is_a_problem(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(moeops, "topk_route", fail)
    assert main(["info"]) == 1
    assert "cpu: must run moeops' ops, got: no kernel image" in capsys.readouterr().err


def test_stale_installation_is_a_problem(monkeypatch):
    monkeypatch.setattr(moeops, "__version__", "9.9.9")
    _, problems = _info.report()
    assert any("must be 9.9.9 like the Python files" in problem for problem in problems)


def test_gpu_without_cuda_library_is_a_problem(monkeypatch):
    class Gpu:
        name, major, minor, total_memory = "Test GPU", 9, 0, 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(_extension, "loaded_libraries", lambda: {"libmoeops_cpu.so": Path("x")})
    monkeypatch.setattr(_extension, "cuda_status", lambda: "not built: no CUDA compiler")
    text, problems = _info.report()
    assert "Test GPU, capability 9.0, 1 GiB" in text
    assert any("libmoeops_cuda.so: must be loaded" in problem for problem in problems)


@pytest.mark.parametrize(
    ("capability", "architectures", "kernels", "says"),
    [
        (9, "80 90a-real", "auto", "Hopper kernels for half types"),
        (9, "80 90a-real", "general", "general kernels: MOEOPS_KERNELS is general"),
        (9, "80", "auto", "general kernels: built for 80, without 90a"),
        (8, "80 90a-real", "auto", "general kernels: wgmma exists on compute capability 9 only"),
    ],
    ids=["hopper", "forbidden", "not_built", "ampere"],
)
def test_says_which_kernels_a_gpu_gets_and_why(
    monkeypatch, capability, architectures, kernels, says
):
    class Gpu:
        major = capability

    class Build:
        @staticmethod
        def build_info():
            return {"cuda_architectures": architectures}

    monkeypatch.setenv("MOEOPS_KERNELS", kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(_extension, "loaded_libraries", lambda: {"libmoeops_cuda.so": Path("x")})
    monkeypatch.setattr(_info, "import_module", lambda name: Build)
    (row,) = _info._gpu_speed()
    assert row.startswith("  cuda:0 ops")
    assert says in row


def test_says_what_is_missing_and_how_to_get_it(monkeypatch):
    versions = {"transformers": "5.8.1", "peft": "0.9.0", "numba": "0.68.1"}
    monkeypatch.setattr(_info, "_version", versions.get)
    rows = {row.split()[0]: row for row in _info._projects()}
    assert rows["transformers"].endswith(" 5.8.1")
    assert "0.9.0 is too old: pip install --upgrade 'moeops[peft]' for 0.20" in rows["peft"]
    assert rows["megatron-core"].endswith("missing: pip install 'moeops[megatron]'")

    def refuse(name):
        raise ImportError("Numba needs NumPy 2.4 or less")

    monkeypatch.setattr(_info, "import_module", refuse)
    (row,) = _info._numba()
    assert "numba 0.68.1 does not import: Numba needs NumPy 2.4 or less" in row
    monkeypatch.setattr(_info, "_version", lambda name: None)
    assert _info._numba() == ["  Numba on CPU       missing: pip install 'moeops[numba]'"]


def test_one_version_in_package_build_and_changelog():
    root = Path(__file__).parents[1]
    assert f'\nversion = "{moeops.__version__}"\n' in (root / "pyproject.toml").read_text()
    headings = re.findall(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", moeops.__version__]


def test_the_oldest_versions_are_those_of_the_extras():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    named = [p for p in _info.PROJECTS if p[2].startswith("moeops[")]
    assert len(named) == 4
    for name, oldest, _ in named:
        assert re.search(rf'"{name}>={re.escape(oldest)}[",]', text), name


def test_more_cores_than_threads_are_named(monkeypatch):
    monkeypatch.setattr(_info, "_usable_cores", lambda: torch.get_num_threads() + 1)
    assert "OMP_NUM_THREADS" in _info._cpu_speed()[0]
    monkeypatch.setattr(_info, "_usable_cores", torch.get_num_threads)
    assert "OMP_NUM_THREADS" not in _info._cpu_speed()[0]


def test_unknown_command_is_refused():
    with pytest.raises(SystemExit) as exit_info:
        main(["nonsense"])
    assert exit_info.value.code == 2
