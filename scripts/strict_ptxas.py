"""Runs a CUDA compiler and fails where ptxas gave up speed in silence: ``strict_ptxas.py nvcc ARGUMENTS...``.

CMake puts it before nvcc for the Hopper kernels in builds with MOEOPS_WERROR. ptxas only informs, with codes C75xx,
when it serialises matrix products or ignores a change of registers, and never fails over registers spilled to memory;
either makes a kernel several times slower and no less right.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

# Bytes of spill stores that a kernel may have, by a part of its mangled name. None has any.
ALLOWED_SPILLS: dict[str, int] = {}

LOST_SPEED = re.compile(r"\((C75\d\d)\)[^\n]*")
PROPERTIES = re.compile(r"Function properties for (\S+)\n[^\n]*?(\d+) bytes spill stores")


def complaints(log: str) -> list[str]:
    """What in ptxas' verbose output must not be there."""
    found = [match[0].strip() for match in LOST_SPEED.finditer(log)]
    for name, spilled in PROPERTIES.findall(log):
        allowed = max((b for part, b in ALLOWED_SPILLS.items() if part in name), default=0)
        if int(spilled) > allowed:
            found.append(f"{name} spills {spilled} bytes, {allowed} are allowed")
    return found


def main(command: Sequence[str]) -> int:
    """The compiler's exit code, or 1 for complaints."""
    run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    sys.stdout.write(run.stdout)
    found = complaints(run.stdout)
    for line in found:
        print(f"strict_ptxas: {line}", file=sys.stderr)
    return run.returncode or int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
