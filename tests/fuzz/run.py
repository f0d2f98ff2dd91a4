"""Draw cases, run them, and print those that fail as tests to paste."""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch

from fuzz import compiled, gates, layers, ops, ranks

KINDS = {"ops": ops, "gates": gates, "layers": layers, "compiled": compiled, "ranks": ranks}
# Of so many cases together. A compiled one takes a second, the others milliseconds.
SHARES = {"ops": 600, "gates": 200, "layers": 300, "compiled": 4, "ranks": 40}


class Case(NamedTuple):
    """One case: ``check(kind, seed, **options)`` runs it anywhere."""

    kind: str
    seed: int
    options: dict[str, Any]

    def as_test(self) -> str:
        """Source of a test that runs this case, to paste into a file under ``tests/``."""
        name = self.options.get("op") or self.options.get("gate") or self.kind
        lines = "".join(f"        {key}={value!r},\n" for key, value in self.options.items())
        return (
            "from fuzz.run import check\n\n\n"
            f"def test_{self.kind}_{name}_{self.seed}():\n"
            f'    check(\n        "{self.kind}",\n        {self.seed},\n{lines}    )\n'
        )


class Failure(NamedTuple):
    """A case that failed, and with what."""

    case: Case
    error: BaseException

    def text(self) -> str:
        """The error as a comment, and the case as a test."""
        error = f"{type(self.error).__name__}: {self.error}"
        return "".join(f"# {line}\n" for line in error.splitlines()[:12]) + self.case.as_test()


def check(kind: str, seed: int, /, **options: Any) -> None:
    """Run one case; raises what the case raises."""
    KINDS[kind].check(seed, **options)


def draw(seed: int, kinds: tuple[str, ...] = ()) -> Case:
    """The case of a seed: the same on every machine."""
    rng = Random(seed)
    names = kinds or tuple(KINDS)
    kind = rng.choices(names, [SHARES[name] for name in names])[0]
    return Case(kind, seed, KINDS[kind].draw(rng))


PER_SEED = 1_000_000  # cases, numbered from this many times the seed on


class Report(NamedTuple):
    """What a run did: cases it was asked for and ran of each kind, those that failed, and seconds for each kind."""

    wanted: int
    counts: collections.Counter
    failures: list[Failure]
    seconds: collections.Counter

    def text(self) -> str:
        """One line per kind, and how many cases there were."""
        lines = [
            f"{kind}: {count} cases, {self.seconds[kind] / count * 1e3:.1f} ms each"
            for kind, count in sorted(self.counts.items())
        ]
        total = sum(self.counts.values())
        lines.append(f"{total} of {self.wanted} cases, {len(self.failures)} failed")
        return "\n".join(lines)


def run(
    cases: int,
    seed: int,
    seconds: float | None = None,
    kinds: tuple[str, ...] = (),
    stop_after: int = 10,
    on_failure: Callable[[Failure], None] = lambda _failure: None,
) -> Report:
    """Run ``cases`` cases, from ``seed`` on; fewer where ``seconds`` end first or ``stop_after`` have failed."""
    report = Report(cases, collections.Counter(), [], collections.Counter())
    end = None if seconds is None else time.monotonic() + seconds
    first = seed * PER_SEED
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for problems as small as these
    try:
        for number in range(first, first + cases):
            begin = time.monotonic()
            if end is not None and begin > end:
                break
            case = draw(number, kinds)
            try:
                check(case.kind, case.seed, **case.options)
            except Exception as err:
                report.failures.append(Failure(case, err))
                on_failure(report.failures[-1])
            report.counts[case.kind] += 1
            report.seconds[case.kind] += time.monotonic() - begin
            if len(report.failures) >= stop_after:
                break
    finally:
        torch.set_num_threads(threads)
        for kind in KINDS.values():
            if hasattr(kind, "close"):
                kind.close()
    return report


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, help="1000, or as many as --seconds have")
    parser.add_argument(
        "--seed", type=int, default=int(time.strftime("%Y%m%d")), help="today's date"
    )
    parser.add_argument("--seconds", type=float, help="stop after so many, whatever --cases says")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=())
    parser.add_argument("--stop-after", type=int, default=10, help="failures")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    most = 1000 if args.seconds is None else PER_SEED
    report = run(
        most if args.cases is None else args.cases,
        args.seed,
        args.seconds,
        tuple(args.kinds),
        args.stop_after,
        on_failure=lambda failure: print(f"\n{failure.text()}", flush=True),
    )
    print(report.text())
    return 1 if report.failures else 0
