"""Faults of the day, and that the machinery which plays them sees what it must see; see ``python -m tests.faults``."""

from __future__ import annotations

import time

import pytest
import torch

from faults import mutations, saves, steps
from faults.run import KINDS, first_of
from moeops.distributed.checkpoint import files, sources

pytestmark = pytest.mark.distributed

CASES = {"mutations": 60, "saves": 5, "steps": 3}


@pytest.mark.parametrize("kind", CASES)
def test_faults_of_the_day(kind, tmp_path, record_property):
    """Other ones every day; the end of the log says how to play them again."""
    seed, cases, lines = int(time.strftime("%Y%m%d")), CASES[kind], []
    failures = KINDS[kind].run(first_of(seed), cases, tmp_path, lines.append)
    command = f"python -m tests.faults {kind} --cases {cases} --seed {seed}"
    record_property("log", "\n".join([command, *lines]))
    assert not failures, "\n\n".join(failures)


def test_every_damage_and_reader_is_drawn():
    drawn = [mutations.Case.draw(number) for number in range(300)]
    assert drawn == [mutations.Case.draw(number) for number in range(300)]
    assert {case.damage for case in drawn} == set(mutations.DAMAGES)
    assert {case.reader for case in drawn} == set(mutations.READERS)
    jobs = [saves.Case.draw(number) for number in range(100)]
    assert {case.size for case in jobs} == set(saves.SIZES)
    assert {case.by for case in jobs} == {"time", "event"}
    trained = [steps.Case.draw(number) for number in range(100)]
    assert {case.layer for case in trained} == set(steps.LAYERS)
    assert {case.backend for case in trained} == {None, "aot_eager", "inductor"}
    assert {case.victim for case in trained} == {0, 1, 2}


@pytest.fixture
def merged(tmp_path):
    """A merged file of each step, and what ``mutations.play`` needs."""
    values = {}
    for step in mutations.STEPS:
        net, optimizer = mutations.build(mutations.ALONE, steps=step)
        values[step] = mutations.snapshot(net, optimizer)
        extra = {"step": step, "random": torch.arange(5)}
        mutations.save_checkpoint(tmp_path / f"folder{step}", net, optimizer, extra)
        mutations.merge_checkpoint(tmp_path / f"folder{step}", tmp_path / f"merged{step}")
    net, optimizer = mutations.build(mutations.ALONE)
    return tmp_path, mutations.Truth(net, optimizer, mutations.snapshot(net, optimizer), values)


@pytest.mark.parametrize("fault", ["runs pickles", "reads damage", "crashes", "hides the file"])
def test_a_fault_of_the_library_is_seen(fault, merged, monkeypatch):
    folder, truth = merged
    case = mutations.Case(1, "put_foreign", "merged", "load")
    load = torch.load

    def bomb(place, rng):
        torch.save(mutations.Bomb(place.mark), place.path)

    monkeypatch.setitem(mutations.DAMAGES, "put_foreign", bomb)
    assert mutations.play(case, folder, truth) == "refused"
    if fault == "runs pickles":
        monkeypatch.setattr(
            torch, "load", lambda *_, **o: load(*_, **(o | {"weights_only": False}))
        )
        wanted = "a pickle was run"
    elif fault == "reads damage":
        case = mutations.Case(2, "flip_bits", "folder", "load")
        monkeypatch.setitem(mutations.DAMAGES, "flip_bits", flip_a_weight)
        monkeypatch.setattr(files, "digest_of", lambda file: {"bytes": 0, "sha256": ""})
        monkeypatch.setattr(sources.files, "check_files", lambda *_, **__: None)
        wanted = "AssertionError: "
    elif fault == "crashes":
        monkeypatch.setattr(torch, "load", lambda *_, **__: mutations.os.abort())
        wanted = "ended with -6"
    else:
        monkeypatch.setattr(sources, "check_merged", lambda *_: None)
        monkeypatch.setattr(torch, "load", lambda *_, **__: {"format": files.FORMAT, "version": 1})
        wanted = "KeyError: "
    assert wanted in mutations.play(case, folder, truth)


def flip_a_weight(place, rng):
    """One bit in the middle of a tensor's bytes."""
    (data,) = place.path.glob("data-*/*.distcp")
    content = bytearray(data.read_bytes())
    weight = mutations.all_values(*mutations.build(mutations.ALONE, steps=2))["first.weight"]
    at = content.index(weight.detach().numpy().tobytes())
    content[at + 5] ^= 16
    data.write_bytes(content)


def test_an_error_that_names_no_op_is_seen():
    assert saves.check_job(['{"error": ""}', '{"error": ""}'])
    right = "RuntimeError: save_checkpoint: every rank of group '0' (rank 1 of 2) time-out of 30 s"
    assert not saves.check_job(["", f'{{"error": "{right}"}}'])
    with pytest.raises(AssertionError, match="Connection closed"):
        saves.check_job(["", '{"error": "RuntimeError: Connection closed by peer"}'])
