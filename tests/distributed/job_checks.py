"""Checks of what a job measures of itself, run by every rank of a group."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from moeops.comm import RankGroup, rank_group
from moeops.cost.model import CostModel
from moeops.profiling import job
from moeops.profiling.job import JobLayer, job_model
from processes import Ranks

LAYER = JobLayer(d_model=32, d_hidden=16, num_projections=3, num_expert=2, dtype="float32")


def check_a_job_measures_itself_once(ranks: Ranks) -> None:
    """All ranks have rank 0's model; the next job reads its file, unless it is told to measure again."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(ranks.folder / "cache")
    device, group = torch.device(ranks.device), rank_group(dist.group.WORLD)

    def get(**options) -> CostModel:
        return job_model("FMoE", LAYER, group, device, **options)

    begin = time.monotonic()
    model = get(seconds=0.5)
    assert time.monotonic() - begin < 20
    every: list = [None] * ranks.size
    dist.all_gather_object(every, model)
    assert every == [model] * ranks.size
    for way in ("forward", "backward"):
        laws = getattr(model.experts["float32"], way)
        few, many = (laws.seconds((w, p, b)) for w, p, b in ((3072, 6e3, 1e3), (3072, 6e7, 1e7)))
        assert 0 < few <= many
    assert model.all_to_all_seconds(1e8, ranks.size) > 0
    assert model.all_reduce_law(ranks.size).seconds(1e8) > 0
    assert min(model.gather_seconds(1e6, ranks.size)) > 0
    assert model.memory_seconds(1e6) > 0
    assert 0 <= model.overlap_loss <= 1
    assert model.machine["layer"] == {
        "d_model": 32, "d_hidden": 16, "num_projections": 3, "num_expert": 2, "dtype": "float32",
    }  # fmt: skip
    (path,) = (ranks.folder / "cache" / "moeops").iterdir()
    assert CostModel.load(path) == model

    calls = []
    measure = job._measure

    def counted(*arguments):
        calls.append(1)
        return measure(*arguments)

    job._measure = counted
    try:
        assert get() is model
        job._known.clear()  # as a new job
        assert get() == model
        assert not calls
        again = get(refresh=True, seconds=0.5)
        assert len(calls) == 1
        assert again != model
        assert get() is again
        assert CostModel.load(path) == again
    finally:
        job._measure = measure

    job._known.clear()
    dist.barrier()
    if ranks.rank == 0:
        path.write_text("{")
    with pytest.raises(
        (ValueError, RuntimeError), match=r"job-\w+\.json must be JSON, got a damaged"
    ):
        get()


def check_there_must_be_something_to_measure(ranks: Ranks) -> None:
    group = rank_group(dist.group.WORLD)
    for device, ranks_of, said in (
        ("meta", group, "got device 'meta' and backend"),
        (ranks.device, RankGroup(group.name, 1, 0), r"in group '\d+' \(rank 0 of 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            job_model("FMoE", LAYER, ranks_of, torch.device(device))
