"""Start processes that form a group, run every check of a module in each of them, and report what failed where.

One start serves many checks, because a start takes seconds. A check that fails may leave its peers in the middle of a
collective, so the checks after it run in a new set of processes: one failure does not hide the others.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from traceback import TracebackException
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GROUP_TIMEOUT = 30  # seconds until a collective gives up; a machine that is busy needs some
TESTS = str(Path(__file__).parent)
PRELOAD = ["torch.nn.parallel", "torch._dynamo", "moeops.distributed", "warm_compiler"]
MAX_VALUE = 400  # characters of a local variable in a report


class Ranks(NamedTuple):
    """What a check gets: this process among the others."""

    rank: int
    size: int
    device: str
    folder: Path = Path()  # for files; all ranks have the same

    @property
    def gather(self) -> str:
        """The collective by which rows of all ranks begin to travel: gloo's own may not run twice at once."""
        return "all_to_all_single" if self.device == "cpu" else "all_gather_into_tensor"

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of a batch that every rank has: equal parts but for the last."""
        return x.tensor_split(self.size)[self.rank].to(self.device)


def start_rank(rank: int, world_size: int, backend: str, folder: str, timeout: float) -> Ranks:
    torch.set_num_threads(1)
    device = "cpu" if backend == "gloo" else f"cuda:{rank}"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    return Ranks(rank, world_size, device, Path(folder))


def explain(err: BaseException) -> str:
    """A traceback with the values of local variables in the tests' own functions."""
    torch.set_printoptions(threshold=30, edgeitems=2)
    try:
        trace = TracebackException.from_exception(err, capture_locals=True)
    except Exception:  # a variable that cannot be shown
        trace = TracebackException.from_exception(err)
    for frame in trace.stack:
        shown = frame.filename.startswith(TESTS) and frame.filename != __file__
        known = frame.locals if shown else None
        frame.locals = {k: v[:MAX_VALUE] for k, v in known.items()} if known else None
    return "".join(trace.format())


def find_checks(module: str) -> list[tuple[str, Callable[[Ranks], None]]]:
    """Every ``check_*`` function of modules with spaces between their names."""
    checks = []
    for part in module.split():
        found = vars(importlib.import_module(part)).items()
        checks += [(name, check) for name, check in found if name.startswith("check_")]
    assert checks, f"{module} has no checks"
    return checks


def _run(
    rank: int,
    module: str,
    first: int,
    world_size: int,
    backend: str,
    folder: str,
    timeout: float,
):
    # A rank that fails must end at once, and not wait for its peers in the destructor of the group.
    report = Path(folder, f"rank{rank}.txt")
    name = "start"
    try:
        assert "warm_compiler" in sys.modules, "the process that ranks are forks of is not ready"
        checks = find_checks(module)
        ranks = start_rank(rank, world_size, backend, folder, timeout)
        for place, (name, check) in enumerate(checks[first:], first):
            Path(folder, f"rank{rank}.at").write_text(f"{place} {name}")
            if "torch._dynamo" in sys.modules:  # importing it takes seconds
                torch._dynamo.reset()
            torch.manual_seed(0)
            check(ranks)
        name = "end"
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as err:
        report.write_text(f"rank {rank} in {name}:\n{explain(err)}")
        os._exit(1)


def _start_server(context) -> None:
    """Start the process whose forks the others are, unless it is running."""
    context.set_forkserver_preload(PRELOAD)
    path = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def launch(worker, args: tuple, world_size: int, seconds: float) -> list[int]:
    """Run ``worker(rank, *args)`` in ``world_size`` processes; return their exit codes. Nothing is left running.

    The processes are forks of one that has imported torch and compiled a line of code, which saves seconds for each.
    """
    context = mp.get_context("forkserver")
    _start_server(context)
    processes = [context.Process(target=worker, args=(rank, *args)) for rank in range(world_size)]
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        assert not late, f"ranks {late} of {world_size} did not end in {seconds} s"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def run_checks(
    module: str, world_size: int, backend: str, folder: Path, seconds: float = 240
) -> None:
    """Run every ``check_*`` function of a module on ``world_size`` ranks; fail with every error of every rank.

    ``module`` may name several modules, with spaces between.
    """
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} CUDA devices are needed, {torch.cuda.device_count()} are there")
    reports: list[str] = []
    first: int | None = 0
    while first is not None:
        own = folder / f"from{first}"
        own.mkdir()
        args = (module, first, world_size, backend, str(own), GROUP_TIMEOUT)
        try:
            codes = launch(_run, args, world_size, seconds)
        except AssertionError as err:
            at = [path.read_text() for path in sorted(own.glob("rank*.at"))]
            reports.append(f"{err}; they were in {at}")
            break
        failures = [path.read_text() for path in sorted(own.glob("rank*.txt"))]
        if any(codes):
            reports += [f"exit codes {codes}", *failures]
        first = _after_failure(module, own) if any(codes) else None
    if reports:
        pytest.fail("\n".join(reports), pytrace=False)


def _after_failure(module: str, folder: Path) -> int | None:
    """The check after the one in which ranks failed first, ``None`` where there is none to go on with."""
    places = [int(path.read_text().split()[0]) for path in folder.glob("rank*.at")]
    following = min(places, default=-1) + 1
    return following if 0 < following < len(find_checks(module)) else None
