"""Importing: what is missing is named, CUDA is left alone, and the debug switch is read."""

from __future__ import annotations

import os
import subprocess
import sys

from numba_prototypes import require_numba

require_numba()


def run(script, tmp_path, **environment):
    file = tmp_path / "script.py"
    file.write_text(script)
    done = subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_numba(tmp_path):
    script = """
import sys
sys.modules["numba"] = None  # import numba now raises ImportError
import moeops
try:
    import moeops.numba
except ImportError as err:
    print(err)
"""
    out = run(script, tmp_path)
    assert "moeops.numba: numba must be installed" in out
    assert "pip install 'moeops[numba]'" in out


def test_import_leaves_cuda_alone(tmp_path):
    script = """
import sys, torch, moeops
assert "numba" not in sys.modules
import moeops.numba, moeops.numba.gates
assert not torch.cuda.is_initialized()
if sys.platform == "linux":
    # torch's CUDA wheel may load the driver's library itself; a context would show as an open device.
    import os
    opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert not [name for name in opened if name.startswith("/dev/nvidia")], opened
print(moeops.numba.gates.naive_topk.debug)
"""
    assert run(script, tmp_path, MOEOPS_DEBUG_CHECKS="1").strip() == "True"
