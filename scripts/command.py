"""How the scripts run other programs whose failure ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run(script: str, command: Sequence[str], cwd: Path, **variables: str) -> str:
    """Output of a command; its whole output and the end of the script if it fails.

    Args:
        script: who runs it, for the error.
        command: program and arguments.
        cwd: the folder in which it runs, without ``PYTHONPATH``.
        variables: of the environment, beside those that are there.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{script}: in {cwd}, {' '.join(command)} failed:\n{result.stdout}")
    return result.stdout
