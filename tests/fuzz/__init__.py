"""Random cases of ops, gates, layers, compiled graphs and two ranks against the reference: ``python -m tests.fuzz``.

A kind of case is a module with ``draw(rng)``, which returns the options of a case, plain literals, and
``check(seed, **options)``, which raises AssertionError. The same options and seed are the same case everywhere.
"""

import sys
from pathlib import Path

# What the cases are made of lies beside the tests, whose folders pytest adds one by one.
_TESTS = Path(__file__).parent.parent
_FOLDERS = [str(_TESTS / name) for name in ("", "gates", "distributed")]
sys.path += [folder for folder in _FOLDERS if folder not in sys.path]
