"""A short soak, and that a long one would see what grows and what differs."""

from __future__ import annotations

import gc

import pytest
import torch

import moeops
import soak

CPU = torch.device("cpu")
STEPS = 3 * soak.LOOKS


@pytest.fixture(autouse=True)
def other_tests_objects_are_left_alone():
    """Each look counts and collects all objects, which takes seconds where other tests have left millions."""
    gc.collect()
    gc.freeze()


def run(dtype):
    """Problems of a soak of Dynamo's graphs alone, which take a second each."""
    torch._dynamo.reset()
    looks = soak.soak(STEPS, CPU, dtype, "eager")
    assert [look.step for look in looks] == list(range(3, STEPS + 1, 3))
    return soak.judge(looks, soak.TOLERANCES[dtype].loss)


def test_a_short_soak():
    """Of three graphs: 0 tokens, one and more."""
    assert run(torch.float64) == []
    assert soak.counters["stats"]["unique_graphs"] == 3


def test_kept_tensors_open_files_and_another_loss_are_seen(monkeypatch):
    """The compiled model's steps keep what they should not, and its gate's bias stays where it is."""
    kept = []
    update = moeops.update_gates

    class Run(soak.Run):
        def __init__(self, dtype, device, backend):
            super().__init__(dtype, device, backend)
            if backend is not None:
                leaking.append(self.model)

    def leak(model, progress):
        if model is leaking[0]:
            kept.append((torch.ones(2**18), open(__file__)))  # noqa: SIM115  (left open)
        else:
            update(model, progress)

    leaking = []
    monkeypatch.setattr(moeops, "update_gates", leak)
    monkeypatch.setattr(soak, "Run", Run)
    problems = run(torch.float64)
    for _, file in kept:
        file.close()
    found = {problem.split(":")[0] for problem in problems} - {"objects"}
    assert found == {"resident", "files", "loss"}


def look(step, **values):
    before = soak.Look(step, 1.0, 2**28, 2**20, 3, 7, 2, 400_000, 0.5, 0.5)
    return before._replace(**values)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, []),
        ({"resident": 2**28 + 2**22, "objects": 400_100, "on_device": 2**20 + 512}, []),
        ({"resident": 2**28 + 9 * 2**20}, ["resident"]),
        ({"on_device": 2**20 + 2**17}, ["on_device"]),
        ({"graphs": 4}, ["graphs"]),
        ({"files": 8, "threads": 3}, ["files", "threads"]),
        ({"objects": 401_000}, ["objects"]),
        ({"loss": 0.5 + 1e-5}, ["loss"]),
        ({"loss": float("nan")}, ["loss"]),
        ({"eager": float("nan")}, ["loss"]),
    ],
)
def test_what_counts_as_growth(values, wanted):
    looks = [look(250), look(500), look(750), look(1000, **values)]
    found = [problem.split(":")[0] for problem in soak.judge(looks, 1e-6)]
    assert found == wanted
