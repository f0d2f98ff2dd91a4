"""Saves that are killed at random points: the checkpoint before or the new one loads, each time.

Two states of a model are saved over each other by jobs of one, two and four ranks. One rank or all of them are killed,
at a random moment or when they touch the folder for a random time, and what is left is what the next job finds.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from checkpoint_checks import all_values, assert_equal, build

from faults.mutations import ALONE, snapshot
from moeops.distributed import load_checkpoint, save_checkpoint
from processes import launch, start_rank

TIMEOUT = 30  # seconds until a collective gives up
SECONDS = 60  # for one case
SIZES = {1: 2, 2: 2, 4: 1}  # ranks of a job, and how often
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


class Case(NamedTuple):
    """Which ranks of a job are killed when; ``point`` is the share of a whole save that passes before."""

    number: int
    size: int
    victims: tuple[int, ...]
    by: str  # "time" or "event"
    point: float

    @classmethod
    def draw(cls, number: int) -> Case:
        """The case of a number."""
        rng = Random(number)
        size = rng.choices(list(SIZES), list(SIZES.values()))[0]
        by = rng.choice(("time", "event"))
        everybody = tuple(range(size))
        victims = everybody if by == "time" and rng.random() < 0.3 else (rng.randrange(size),)
        return cls(number, size, victims, by, rng.uniform(0, 1.1))


class Whole(NamedTuple):
    """What a save takes that nobody interrupts: seconds, and events on each rank."""

    seconds: float
    events: list[int]


class Rank:
    """A rank of a job, and the pipes to it."""

    def __init__(self, rank: int, size: int, step: int, folder: Path, path: Path, kill_at: int):
        self.report = folder / f"rank{rank}.txt"
        ready, tell_ready = os.pipe()
        wait_go, go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(ready)
                os.close(go)
                self._save(rank, size, step, folder, path, kill_at, tell_ready, wait_go)
            except BaseException:
                self.report.write_text(traceback.format_exc())
            finally:
                os._exit(0)
        os.close(tell_ready)
        os.close(wait_go)
        self.ready, self.go = ready, go

    def _save(
        self,
        rank: int,
        size: int,
        step: int,
        folder: Path,
        path: Path,
        kill_at: int,
        tell_ready: int,
        wait_go: int,
    ) -> None:
        signal.alarm(SECONDS)
        ranks = ALONE
        if size > 1:
            ranks = start_rank(rank, size, "gloo", str(folder), TIMEOUT)
        net, optimizer = build(ranks, steps=step)
        count = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal count
            if event in EVENTS and any(str(path) in str(arg) for arg in args):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        os.write(tell_ready, b"x")
        os.read(wait_go, 1)
        begin = time.monotonic()
        error = ""
        try:
            save_checkpoint(path, net, optimizer, {"step": step, "random": torch.arange(5)})
        except (RuntimeError, OSError) as err:
            error = f"{type(err).__name__}: {err}"
        took = time.monotonic() - begin
        self.report.write_text(json.dumps({"error": error, "events": count, "seconds": took}))


def play_job(case: Case, step: int, folder: Path, path: Path, whole: Whole | None) -> list[str]:
    """Save a state by a job whose victims are killed; what each rank wrote, "" for the killed."""
    folder.mkdir()
    kill_at = [0] * case.size
    if whole is not None and case.by == "event":
        for rank in case.victims:
            kill_at[rank] = 1 + int(case.point * whole.events[rank])
    ranks = [Rank(r, case.size, step, folder, path, kill_at[r]) for r in range(case.size)]
    for rank in ranks:
        assert os.read(rank.ready, 1), rank.report.read_text()
    for rank in ranks:
        os.write(rank.go, b"x")
    if whole is not None and case.by == "time":
        time.sleep(case.point * whole.seconds)
        for victim in case.victims:
            os.kill(ranks[victim].pid, signal.SIGKILL)
    written = []
    for number, rank in enumerate(ranks):
        code = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
        os.close(rank.ready)
        os.close(rank.go)
        killed = code == -signal.SIGKILL and number in case.victims
        assert killed or code == 0, f"rank {number} ended with {code}"
        written.append("" if killed else rank.report.read_text())
    return written


def check_job(written: list[str]) -> bool:
    """Survivors end well or with an error that names the op; whether all ranks ended well."""
    errors = []
    for rank, text in enumerate(written):
        assert not text or text.startswith("{"), text
        error = json.loads(text)["error"] if text else "killed"
        errors.append(error)
        if error not in ("", "killed"):
            start = f"RuntimeError: save_checkpoint: every rank of group '0' (rank {rank} of "
            assert error.startswith(start), error
            assert f"time-out of {TIMEOUT} s" in error, error
    return not any(errors)


def run(first: int, cases: int, folder: Path, log: Callable[[str], None] = print) -> list[str]:
    """Play cases from number ``first`` on; the text of those that failed."""
    codes = launch(_play_all, (first, cases, str(folder)), 1, 60 + cases * SECONDS)
    assert codes == [0], f"the process that plays the cases ended with {codes}"
    found = json.loads((folder / "report.json").read_text())
    log(f"{cases} saves: {found['outcomes']}")
    return found["failures"]


def _play_all(_: int, first: int, cases: int, folder: str) -> None:
    torch.set_num_threads(1)
    outcomes: collections.Counter = collections.Counter()
    failures: list[str] = []
    truth = {step: snapshot(*build(ALONE, steps=step)) for step in (1, 2)}
    path, step = Path(folder, "saved"), 0
    drawn = [Case.draw(number) for number in range(first, first + cases)]
    wholes = {}
    for size in sorted({case.size for case in drawn}):  # each of them leaves a whole checkpoint
        step = 3 - step if step else 1
        case = Case(0, size, (), "", 0.0)
        texts = play_job(case, step, Path(folder, f"whole{size}"), path, None)
        assert check_job(texts), texts
        reports = [json.loads(text) for text in texts]
        seconds = max(report["seconds"] for report in reports)
        wholes[size] = Whole(seconds, [report["events"] for report in reports])
    for case in drawn:
        try:
            before, new = step, 3 - step
            own = Path(folder, f"case{case.number}")
            whole = check_job(play_job(case, new, own, path, wholes[case.size]))
            net, optimizer = build(ALONE)
            step = load_checkpoint(path, net, optimizer)["step"]
            assert_equal(all_values(net, optimizer), truth[step])
            assert not whole or (step == new and len(list(path.iterdir())) == 2)
            outcomes["whole" if whole else f"killed, {'new' if step == new else 'before'}"] += 1
            outcomes[f"{case.size} ranks"] += 1
        except Exception:
            failures.append(f"{case}, {before} before and {new} new: {traceback.format_exc()}")
            if step not in truth or len(failures) > 5:
                break
    report = {"outcomes": dict(outcomes), "failures": failures}
    Path(folder, "report.json").write_text(json.dumps(report))
    os._exit(0)
