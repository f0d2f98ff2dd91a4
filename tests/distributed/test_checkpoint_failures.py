"""A rank is killed while a job saves: the others end with an error, and the checkpoint before or the new one loads.

The jobs are forks of one process, because a start takes seconds; it has no threads, and no group of its own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from checkpoint_checks import assert_loads, build, save

from moeops.distributed import save_checkpoint
from moeops.distributed.checkpoint import files
from processes import Ranks, launch, start_rank

pytestmark = pytest.mark.distributed

ALONE = Ranks(0, 1, "cpu")
RANKS = 4
TIMEOUT = 30  # seconds until a collective gives up

SAVED = "removes what was before"  # after the others know that the new one is saved

# Where which rank is killed, and what loads then: the second step is saved over the first.
POINTS = (
    ("before anything", 1, 1),
    ("opens its data", 1, 1),
    ("opens its data", 0, 1),
    ("reads its data", 2, 1),
    ("opens .metadata", 0, 1),
    ("opens the index", 0, 1),
    ("renames the index", 0, 1),
    ("syncs the renamed index", 0, 2),
    (SAVED, 0, 2),
)


def at(point: str, event: str, args: tuple, path: Path) -> bool:
    """Whether an audit event is the point where the rank is killed."""
    text = repr(args)
    index = f"{files.INDEX}.part"
    return str(path) in text and {
        "opens its data": event == "open" and ".distcp" in text,
        "reads its data": event == "open" and ".distcp" in text and "'r" in text,
        "opens .metadata": event == "open" and ".metadata" in text,
        "opens the index": event == "open" and index in text,
        "renames the index": event == "os.rename" and index in text,
        "syncs the renamed index": event == "open" and str(args[0]) == str(path),
        SAVED: event in ("os.remove", "os.rmdir", "shutil.rmtree"),
    }.get(point, False)


def play(rank: int, point: str, victim: int, folder: Path, path: Path) -> None:
    """Save the second step; the error, with the seconds that it took, goes to a file."""
    start_rank(rank, RANKS, "gloo", str(folder), TIMEOUT)
    ranks = Ranks(rank, RANKS, "cpu")
    net, made = build(ranks, steps=2)
    if rank == victim:

        def watch(event, args):
            if at(point, event, args, path):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        if point == "before anything":
            os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        save_checkpoint(path, net, made, {"step": 2, "random": torch.arange(5)})
    except RuntimeError as error:
        (folder / f"rank{rank}.txt").write_text(f"{time.monotonic() - begin} {error}")


def run_job(point: str, victim: int, folder: Path, path: Path) -> None:
    """Fork the ranks, and check how each of them ends."""
    folder.mkdir()
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                play(rank, point, victim, folder, path)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [-signal.SIGKILL if rank == victim else 0 for rank in range(RANKS)], codes
    for rank in set(range(RANKS)) - {victim}:
        if point == SAVED:
            assert not (folder / f"rank{rank}.txt").exists()
            continue
        seconds, message = (folder / f"rank{rank}.txt").read_text().split(" ", 1)
        assert float(seconds) < TIMEOUT
        assert message.startswith(f"save_checkpoint: every rank of group '0' (rank {rank} of 4)")
        assert f"time-out of {TIMEOUT} s" in message


def kill_everywhere(_: int, folder: str) -> None:
    what = "start"
    try:
        torch.set_num_threads(1)
        path = Path(folder) / "saved"
        for number, (point, victim, loads) in enumerate(POINTS):
            what = f"rank {victim} {point}"
            save(path, ALONE, steps=1)
            assert len(list(path.iterdir())) == 2  # whatever the job before left there is gone
            run_job(point, victim, Path(folder) / f"job{number}", path)
            assert_loads(path, ALONE, "adamw", loads)
    except BaseException:
        (Path(folder) / "report.txt").write_text(f"{what}: {traceback.format_exc()}")
        os._exit(1)


def test_a_rank_killed_while_saving(tmp_path):
    codes = launch(kill_everywhere, (str(tmp_path),), 1, 240)
    report = tmp_path / "report.txt"
    assert codes == [0], report.read_text() if report.exists() else codes
