"""Start processes that form a group, run every check of a module in each of them, and report what failed where.

One start serves many checks, because a start takes seconds.
"""

from __future__ import annotations

import importlib
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GROUP_TIMEOUT = 30  # seconds until a collective gives up; a machine that is busy needs some


class Ranks(NamedTuple):
    """What a check gets: this process among the others."""

    rank: int
    size: int
    device: str

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
    return Ranks(rank, world_size, device)


def _run(rank: int, module: str, world_size: int, backend: str, folder: str, timeout: float):
    # A rank that fails must end at once, and not wait for its peers in the destructor of the group.
    report = Path(folder) / f"rank{rank}.txt"
    name = "start"
    try:
        checks = [
            item for part in module.split() for item in vars(importlib.import_module(part)).items()
        ]
        ranks = start_rank(rank, world_size, backend, folder, timeout)
        ran = 0
        for name, check in checks:
            if name.startswith("check_"):
                torch.manual_seed(0)
                check(ranks)
                ran += 1
        name = "end"
        assert ran, f"{module} has no checks"
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        report.write_text(f"rank {rank} in {name}:\n{traceback.format_exc()}")
        os._exit(1)


def launch(worker, args: tuple, world_size: int, seconds: float) -> list[int]:
    """Run ``worker(rank, *args)`` in ``world_size`` processes; return their exit codes. Nothing is left running."""
    context = mp.get_context("spawn")
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
    """Run every ``check_*`` function of a module on ``world_size`` ranks; fail with the first error of each rank.

    ``module`` may name several modules, with spaces between.
    """
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} CUDA devices are needed, {torch.cuda.device_count()} are there")
    codes = launch(
        _run, (module, world_size, backend, str(folder), GROUP_TIMEOUT), world_size, seconds
    )
    if any(codes):
        reports = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
        pytest.fail(f"exit codes {codes}\n" + "\n".join(reports), pytrace=False)
