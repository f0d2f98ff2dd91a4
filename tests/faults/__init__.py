"""Damage to checkpoints, and jobs that are killed: ``python -m tests.faults``.

A kind of fault is a module with ``run(first, cases, folder)``, which plays the cases from a number on and returns those
that went wrong as text. The same number is the same case everywhere, but for the speed of the machine.
"""

import sys
from pathlib import Path

# What the cases are made of lies beside the tests, whose folders pytest adds one by one.
_TESTS = Path(__file__).parent.parent
_FOLDERS = [str(_TESTS / name) for name in ("", "distributed")]
sys.path += [folder for folder in _FOLDERS if folder not in sys.path]
