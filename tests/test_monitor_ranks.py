"""LoadMonitor on several ranks."""

from __future__ import annotations

import copy
import csv
import io
import os
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from moeops import LoadMonitor
from monitor_checks import D, Model, assert_counts, straight_line


def worker(rank: int, world_size: int, backend: str, folder: str) -> None:
    try:
        torch.set_num_threads(1)
        device = "cpu" if backend == "gloo" else f"cuda:{rank}"
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        torch.manual_seed(3)
        model = Model().to(device)
        monitor = LoadMonitor(model)
        wrapped = DistributedDataParallel(model)
        batches = [b.to(device) for b in torch.randn(2, 6 * world_size, D).unbind()]
        parts = [x.chunk(world_size)[rank] for x in batches]
        for x in parts:
            wrapped(x).sum().backward()
        alone = monitor.summary()
        assert alone["first"].tokens == 12
        calls = []
        reduce = dist.all_reduce
        dist.all_reduce = lambda *a, **kw: calls.append(a) or reduce(*a, **kw)
        together = monitor.summary(group=dist.group.WORLD)
        assert len(calls) == 1
        assert_counts(alone, straight_line(copy.deepcopy(model), parts), 2)
        every = straight_line(
            copy.deepcopy(model), [p for x in batches for p in x.chunk(world_size)]
        )
        assert_counts(together, every, 2 * world_size)
        monitor.write_csv(f"{folder}/load{rank}.csv", 1, group=dist.group.WORLD)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_ranks(backend, folder, world_size=2, seconds=120):
    context = mp.spawn(worker, (world_size, backend, str(folder)), nprocs=world_size, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{world_size} ranks did not end in {seconds} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    rows = list(csv.DictReader(io.StringIO((folder / "load0.csv").read_text())))
    assert [row["tokens"] for row in rows] == [str(12 * world_size)] * 2
    assert not (folder / "load1.csv").exists()


@pytest.mark.distributed
def test_ranks_count_alone_and_sum_on_request(tmp_path):
    run_ranks("gloo", tmp_path)


@pytest.mark.distributed
@pytest.mark.cuda
def test_ranks_on_cuda(tmp_path, cuda_device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    run_ranks("nccl", tmp_path)
