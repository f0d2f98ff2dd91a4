"""Ranks killed at random points of training steps: no other rank hangs, and its error names op, group and time-out.

A step is forward, backward, reduction of gradients, clipping and the optimizer's; the victim gets a signal from the
kernel at a random moment of its steps, wherever it is then.
"""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from parallel_cases import batch, make

from moeops.distributed import (
    DistributedGroupedDataParallel,
    clip_grad_norm_,
    explain_failures,
)
from processes import launch, start_rank

TIMEOUT = 60  # seconds until a collective gives up; one whose peer has ended fails at once
SECONDS = 20  # seconds from the signal to the end of every rank
STEPS = 4  # among which the moment is
LAYERS = {
    "exact": {},
    "chunks": {"n_chunks": 2},
    "modules": {"kind": "modules"},
    "static": {"dispatch": "static", "capacity": 8},
    "gather": {"dispatch": "gather", "rows": 3.0},
    "replicas": {"replicas": {0: 1}},
}
COMPILED = ("exact", "static", "gather")
ERROR = (
    r"[\w .]+: every rank of group '\w+' \(rank {rank} of {size}\) must take part within the "
    r"time-out of {timeout} s, got: "
)


class Case(NamedTuple):
    """A layer, its mode, and the share of ``STEPS`` steps after which which rank is killed."""

    number: int
    layer: str
    backend: str | None
    auto_allreduce: bool
    victim: int
    point: float

    @classmethod
    def draw(cls, number: int) -> Case:
        """The case of a number."""
        rng = Random(number)
        backend = rng.choice((None, None, "aot_eager", "inductor"))
        layer = rng.choice(COMPILED if backend else tuple(LAYERS))
        auto = backend is None and rng.random() < 0.5
        case = cls(number, layer, backend, auto, 0, rng.random())
        return case._replace(victim=rng.randrange(case.size))

    @property
    def size(self) -> int:
        """How many ranks there are; two compile, because that takes seconds."""
        return 2 if self.backend else 3


def train(rank: int, case: Case, folder: str) -> None:
    """Train until an error comes; it goes to a file, with the seconds since the last whole step."""
    report = Path(folder) / f"rank{rank}.txt"
    options = dict(LAYERS[case.layer])
    kind = options.pop("kind", "mlp")
    result = {"error": "", "seconds": 0.0, "steps": 0}
    try:
        start_rank(rank, case.size, "gloo", folder, TIMEOUT)
        layer = make(kind, 2, "cpu", world_size=case.size, **options)
        model = DistributedGroupedDataParallel(layer, auto_allreduce=case.auto_allreduce)
        if case.backend:
            layer.compile(fullgraph=True, backend=case.backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = batch(6, "cpu")

        def step() -> None:
            with explain_failures():
                model(x).square().mean().backward()
                model.allreduce_gradients()
                clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step()
        begin = time.monotonic()
        for _ in range(STEPS):
            step()
        whole = time.monotonic() - begin
        if rank == case.victim:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, case.point * whole))
        begin = time.monotonic()
        while time.monotonic() - begin < SECONDS:
            begin = time.monotonic() if rank != case.victim else begin
            step()
            result["steps"] += 1
            if result["steps"] > 100 * STEPS:
                break
    except RuntimeError as err:
        result.update(error=str(err), seconds=time.monotonic() - begin)
    except BaseException:
        result.update(error=traceback.format_exc())
    report.write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)


def play(case: Case, folder: Path) -> str:
    """Play a case; where the survivors noticed, or AssertionError."""
    codes = launch(train, (case, str(folder)), case.size, 120 + SECONDS)
    ops = []
    for rank, code in enumerate(codes):
        if rank == case.victim and code == -signal.SIGALRM:
            continue
        assert code == 0, f"rank {rank} ended with {code}"
        found = json.loads((folder / f"rank{rank}.txt").read_text())
        assert rank != case.victim, f"the victim was not killed: {found}"
        text = found["error"]
        start = ERROR.format(rank=rank, size=case.size, timeout=TIMEOUT)
        assert re.match(start, text), f"rank {rank}, step {found['steps']}: {text or 'no error'}"
        assert found["seconds"] < SECONDS, found
        ops.append(text.partition(": ")[0])
    return ops[0]


def run(first: int, cases: int, folder: Path, log: Callable[[str], None] = print) -> list[str]:
    """Play cases from number ``first`` on; the text of those that failed."""
    failures, outcomes = [], collections.Counter()
    for number in range(first, first + cases):
        case = Case.draw(number)
        own = folder / f"case{number}"
        own.mkdir()
        try:
            outcomes[play(case, own)] += 1
            outcomes["compiled" if case.backend else "eager"] += 1
        except AssertionError as err:
            failures.append(f"{case}: {err}")
    log(f"{cases} jobs: {dict(outcomes)}")
    return failures
