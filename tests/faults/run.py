"""The command line of the faults."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from faults import mutations, saves, steps

KINDS = {"mutations": mutations, "saves": saves, "steps": steps}


def first_of(seed: int) -> int:
    """The number of a seed's first case."""
    return seed * 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument(
        "--seed", type=int, default=int(time.strftime("%Y%m%d")), help="today's date"
    )
    parser.add_argument("--first", type=int, help="number of the first case, in place of a seed")
    args = parser.parse_args()
    first = first_of(args.seed) if args.first is None else args.first
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moeops-faults-") as folder:
        failures = KINDS[args.kind].run(first, args.cases, Path(folder))
    for failure in failures:
        print(f"\n{failure}")
    seconds = time.monotonic() - begin
    print(f"{args.cases} cases from number {first} on, {len(failures)} failed, {seconds:.0f} s")
    return 1 if failures else 0
