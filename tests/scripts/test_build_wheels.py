from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CPU = "moeops-0.2.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
FILES = ["moeops/__init__.py", "moeops/libmoeops_cpu.so", f"moeops/_C{SUFFIX}"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("build_wheels", SCRIPTS / "build_wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("check_dist", None)


def test_platforms_of_a_name(script):
    assert script.platforms(CPU) == ("manylinux_2_17_x86_64", "manylinux2014_x86_64")
    assert script.platforms("moeops-0.2.0-cp311-cp311-linux_x86_64.whl") == ("linux_x86_64",)


def test_what_a_wheel_must_hold(script):
    cuda = "moeops/libmoeops_cuda.so"
    assert script.complaint("cpu", CPU, FILES) is None
    assert script.complaint("cuda", CPU, [*FILES, cuda]) is None
    assert "must hold" in script.complaint("cuda", CPU, FILES)
    assert "must hold" in script.complaint("cpu", CPU, [*FILES, cuda])
    grafted = script.complaint("cpu", CPU, [*FILES, "moeops.libs/libgomp-24e2ab19.so.1.0.0"])
    assert "libgomp-24e2ab19" in grafted
    local = script.complaint("cpu", "moeops-0.2.0-cp311-cp311-linux_x86_64.whl", FILES)
    assert "manylinux" in local


def test_the_line_of_sizes(script, tmp_path):
    path = tmp_path / CPU
    path.write_bytes(bytes(2**19))
    wheel = script.Wheel("cpu", path, (), {"libmoeops_cpu.so": 3 * 2**20})
    assert wheel.text() == f"cpu: {CPU} 0.50 MiB; unpacked libmoeops_cpu.so 3.0 MiB"


def test_only_what_earlier_runs_left_is_removed(script, tmp_path):
    for name in (CPU, "notes.txt"):
        (tmp_path / name).touch()
    script.remove_wheels(tmp_path)
    script.remove_wheels(tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_kinds_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build_wheels.py", "rocm"])
    with pytest.raises(SystemExit):
        script.main()
    assert "kinds must be among cpu, cuda, got rocm" in capsys.readouterr().err


def test_a_command_that_fails_ends_the_run(script):
    with pytest.raises(SystemExit, match=r"(?s)build_wheels: .* failed:\nits last word"):
        script.run(sys.executable, "-c", "print('its last word'); raise SystemExit(3)")
