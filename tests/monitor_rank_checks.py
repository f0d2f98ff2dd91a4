"""Checks for several processes: a LoadMonitor counts its own rank, and all ranks where it is asked to."""

from __future__ import annotations

import copy
import csv
import io

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from moeops import LoadMonitor
from monitor_checks import D, Model, assert_counts, straight_line


def check_counts(ranks):
    torch.manual_seed(3)
    model = Model().to(ranks.device)
    monitor = LoadMonitor(model)
    wrapped = DistributedDataParallel(model)
    batches = [b.to(ranks.device) for b in torch.randn(2, 6 * ranks.size, D).unbind()]
    parts = [ranks.split(x) for x in batches]
    for x in parts:
        wrapped(x).sum().backward()
    alone = monitor.summary()
    assert alone["first"].tokens == 12
    calls = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *a, **kw: calls.append(a) or reduce(*a, **kw)
    try:
        together = monitor.summary(group=dist.group.WORLD)
    finally:
        dist.all_reduce = reduce
    assert len(calls) == 1
    assert_counts(alone, straight_line(copy.deepcopy(model), parts), 2)
    all_parts = [part for x in batches for part in x.tensor_split(ranks.size)]
    every = straight_line(copy.deepcopy(model), all_parts)
    assert_counts(together, every, 2 * ranks.size)
    # One file for all ranks.
    path = ranks.folder / f"load{ranks.rank}.csv"
    monitor.write_csv(path, 1, group=dist.group.WORLD)
    assert path.exists() == (ranks.rank == 0)
    if ranks.rank == 0:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        assert [row["tokens"] for row in rows] == [str(12 * ranks.size)] * 2
