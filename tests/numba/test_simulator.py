"""The gallery's CUDA kernels under Numba's simulator, which holds for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from numba_prototypes import require_numba

require_numba()

from gallery_samples import CASES


def test_gallery_under_the_simulator():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gallery_samples.py"))],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(": simulator: ") for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == list(CASES)
    assert not [name for name, report in lines if report.startswith("0 samples")]
