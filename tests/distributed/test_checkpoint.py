"""Checkpoints for any number of ranks; what jobs of several ranks do is in checkpoint_checks.py."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from checkpoint_checks import Net, assert_loads, build, save, worker
from torch import nn

from moeops import FMoETransformerMLP
from moeops.distributed import (
    load_checkpoint,
    merge_checkpoint,
    read_extra,
    save_checkpoint,
)
from moeops.distributed.checkpoint import files
from moeops.gates import DeepSeekV3Gate
from processes import Ranks, launch

ALONE = Ranks(0, 1, "cpu")


def run_jobs(sizes, backend, folder):
    codes = launch(worker, (sizes, backend, str(folder)), max(sizes), 240)
    if any(codes):
        reports = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
        pytest.fail(f"exit codes {codes}\n" + "\n".join(reports), pytrace=False)


@pytest.mark.distributed
@pytest.mark.slow
def test_jobs_of_4_2_and_1_ranks_load_what_the_others_saved(tmp_path):
    run_jobs([4, 2, 1], "gloo", tmp_path)


@pytest.mark.cuda
@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [[2, 1], [4, 2, 1]], ids=["2_1", "4_2_1"])
def test_nccl(sizes, tmp_path, cuda_device):
    if torch.cuda.device_count() < sizes[0]:
        pytest.skip(f"{sizes[0]} CUDA devices are needed, {torch.cuda.device_count()} are there")
    run_jobs(sizes, "nccl", tmp_path)


def test_a_checkpoint_of_an_earlier_version_loads(tmp_path):
    """In the archive is what the version of November 22, 2026 saved on two ranks, two experts on each.

    Parameter ``i`` counts up from ``1000 i`` in steps of 1, all over 8; its gradient in one step of AdamW was a 16th.
    """
    ZipFile(Path(__file__).with_name("stored_checkpoint.zip")).extractall(tmp_path)
    moe = FMoETransformerMLP(4, 4, 3, activation="swiglu", top_k=2, gate=DeepSeekV3Gate)
    model = nn.ModuleDict({"embed": nn.Linear(4, 4, bias=False), "moe": moe})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    assert load_checkpoint(tmp_path, model, optimizer) == {"step": 7, "made": "f57750e"}
    assert optimizer.param_groups[0]["lr"] == 0.125
    for i, (name, parameter) in enumerate(model.named_parameters()):
        stored = (torch.arange(parameter.numel()).view_as(parameter) + 1000.0 * i) / 8
        assert torch.equal(parameter, stored), name
        state = optimizer.state[parameter]
        torch.testing.assert_close(state["exp_avg"], 0.1 * stored / 16)
        torch.testing.assert_close(state["exp_avg_sq"], 0.001 * (stored / 16).square())
        assert state["step"] == 1, name


def killed_at(number: int, path: Path) -> bool:
    """Save in a process that is killed when it touches the files for the ``number``-th time; say if it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    net, made = build(ALONE, steps=2)
    count = 0

    def watch(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and any(
            str(path) in str(arg) for arg in args
        ):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        save_checkpoint(path, net, made, {"step": 2, "random": torch.arange(5)})
    finally:
        os._exit(0)


def interrupt_everywhere(rank: int, folder: str) -> None:
    try:
        torch.set_num_threads(1)
        path, number, outcomes = Path(folder) / "saved", 1, []
        save(path, ALONE, steps=1)
        while killed_at(number, path):
            steps = load_checkpoint(path, *build(ALONE))["step"]
            assert_loads(path, ALONE, "adamw", steps)
            outcomes.append(f"step{steps}")
            number += 1
            if steps == 2:
                save(path, ALONE, steps=1)
                assert len(list(path.iterdir())) == 2
        assert_loads(path, ALONE, "adamw", 2)
        # Many points before the new one is complete, some after it, and none between.
        first = outcomes.index("step2")
        assert first >= 6, outcomes
        assert len(outcomes) > first, outcomes
        assert set(outcomes[first:]) == {"step2"}, outcomes
    except BaseException:
        (Path(folder) / "report.txt").write_text(traceback.format_exc())
        os._exit(1)


@pytest.mark.distributed
def test_killed_at_any_point_the_checkpoint_before_or_the_new_one_loads(tmp_path):
    # In a process of its own, whose forks have no threads of other tests.
    codes = launch(interrupt_everywhere, (str(tmp_path),), 1, 120)
    report = tmp_path / "report.txt"
    assert codes == [0], report.read_text() if report.exists() else codes


@pytest.fixture
def saved(tmp_path):
    save(tmp_path / "saved", ALONE)
    return tmp_path / "saved"


@pytest.mark.parametrize("how", ["missing", "shorter", "empty"])
def test_a_damaged_file_is_named(saved, how):
    for file in [*saved.glob("data-*/*"), saved / files.INDEX]:
        data = file.read_bytes()
        file.unlink()
        if how != "missing":
            file.write_bytes(data[:-1] if how == "shorter" and file.name != files.INDEX else b"")
        kind = FileNotFoundError if (how, file.name) == ("missing", files.INDEX) else ValueError
        with pytest.raises(kind, match=file.name):
            load_checkpoint(saved, Net(ALONE))
        with pytest.raises(kind, match=file.name):
            merge_checkpoint(saved, saved / "out.pt")
        file.write_bytes(data)
    assert_loads(saved, ALONE, "adamw")


def test_a_damaged_merged_file_is_named(saved):
    out = saved / "out.pt"
    merge_checkpoint(saved, out)
    data = bytearray(out.read_bytes())
    for change in (data[: len(data) // 2], b"", data[:2000] + b"\1\2\3" + data[2003:]):
        out.write_bytes(change)
        with pytest.raises(ValueError, match=r"out.pt is damaged"):
            load_checkpoint(out, Net(ALONE))
    torch.save({"weight": torch.zeros(3)}, out)
    with pytest.raises(ValueError, match="must be a file of merge_checkpoint"):
        load_checkpoint(out, Net(ALONE))


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_that_a_file_says_is_run(saved, tmp_path):
    boom = tmp_path / "boom"
    (data,) = saved.glob("data-*")
    index = json.loads((saved / files.INDEX).read_text())["contents"]
    index["files"][".metadata"] = forge(data / ".metadata", pickle.dumps(Bomb(boom)))
    files.write_index(saved, index)
    assert_loads(saved, ALONE, "adamw")
    torch.save(Bomb(boom), tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    right = index["objects"]["values"]
    index["objects"]["values"] = {"file": "bomb", "start": 0, "length": len(bomb)}
    files.write_index(saved, index)
    with pytest.raises(ValueError, match=r"the file of values must be .* got 'bomb'"):
        load_checkpoint(saved, Net(ALONE))
    index["files"]["bomb"] = forge(data / "bomb", bomb)
    files.write_index(saved, index)
    with pytest.raises(RuntimeError, match="weights"):
        load_checkpoint(saved, Net(ALONE))
    index["objects"]["values"] = right
    key = "model/first.bias"
    index["tensors"][key]["chunks"][0].update(file="bomb", start=0, length=len(bomb))
    files.write_index(saved, index)
    with pytest.raises(RuntimeError, match="weights"):
        load_checkpoint(saved, Net(ALONE))
    with pytest.raises(
        ValueError, match=r"bomb.pt, which torch.load refuses with weights_only=True"
    ):
        load_checkpoint(tmp_path / "bomb.pt", Net(ALONE))
    assert not boom.exists()


def forge(file: Path, data: bytes):
    file.write_bytes(data)
    return files.digest_of(file)


def test_extra_is_plain_python_and_comes_back(tmp_path):
    model = nn.Linear(2, 2)
    extra = {"step": 3, "names": ["a", ("b", None)], "state": torch.get_rng_state()}
    save_checkpoint(tmp_path / "saved", model, extra=extra)
    merge_checkpoint(tmp_path / "saved", tmp_path / "merged.pt")
    state = extra.pop("state")
    for loaded in (
        load_checkpoint(tmp_path / "saved", model),
        read_extra(tmp_path / "saved"),
        read_extra(tmp_path / "merged.pt"),
    ):
        assert torch.equal(loaded.pop("state"), state)
        assert loaded == extra
    with pytest.raises(TypeError, match="extra, extra states"):
        save_checkpoint(tmp_path / "saved", model, extra={"path": Path("x"), "model": model})
    assert load_checkpoint(tmp_path / "saved", model)["step"] == 3


def test_extra_is_read_alone(saved, tmp_path):
    """Damage of tensors is not looked for, but no file may be missing, and what is read is checked."""
    holder = json.loads((saved / files.INDEX).read_text())["contents"]["objects"]["values"]["file"]
    with pytest.raises(FileNotFoundError, match="read_extra: path must hold a checkpoint"):
        read_extra(tmp_path / "nothing")
    for file in saved.glob("data-*/*"):
        data = file.read_bytes()
        changed = bytearray(data)
        changed[len(data) // 2] ^= 1
        file.write_bytes(changed)
        if file.name == holder:
            with pytest.raises(ValueError, match=f"read_extra: .*{file.name} is damaged"):
                read_extra(saved)
        else:
            assert read_extra(saved)["step"] == 2
        file.unlink()
        with pytest.raises(
            ValueError, match=f"{file.name} must be a file that can be read, got No such file"
        ):
            read_extra(saved)
        file.write_bytes(data)
    torch.save({"extra": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must be a file of merge_checkpoint"):
        read_extra(tmp_path / "other.pt")


class Counting(nn.Linear):
    """A module with state that is no tensor."""

    def __init__(self):
        super().__init__(2, 2)
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class WithState(Counting):
    """And with a wrapper around a part."""

    def __init__(self):
        super().__init__()
        self.inner = torch.compile(nn.Linear(2, 2), backend="eager")


def test_extra_states_and_compiled_modules(tmp_path):
    model, other = WithState(), WithState()
    model.calls = 7
    save_checkpoint(tmp_path / "saved", torch.compile(model, backend="eager"))
    load_checkpoint(tmp_path / "saved", other)
    assert other.calls == 7
    assert torch.equal(other.inner.weight, model.inner.weight)
    merge_checkpoint(tmp_path / "saved", tmp_path / "out.pt")
    assert list(torch.load(tmp_path / "out.pt")["model"]) == [
        "bias",
        "inner.bias",
        "inner.weight",
        "weight",
    ]
    save_checkpoint(tmp_path / "plain", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"extra states of .*plain, got model/_extra_state"):
        load_checkpoint(tmp_path / "plain", Counting())
    third = WithState()
    load_checkpoint(tmp_path / "out.pt", third)
    assert third.calls == 7
    assert torch.equal(third.weight, model.weight)


def test_merged_layouts_have_the_documented_names(saved, tmp_path):
    shapes = {}
    for layout in ("fused", "per_expert"):
        merge_checkpoint(saved, tmp_path / "out.pt", layout)
        merged = torch.load(tmp_path / "out.pt", weights_only=True)
        shapes[layout] = {name: list(t.shape) for name, t in merged["model"].items()}
        assert merged["optimizer"]["param_groups"][0]["lr"] == 0.25
        if layout == "fused":
            Net(ALONE).load_state_dict(merged["model"])
    assert shapes["fused"]["mlp.experts.w_up"] == [4, 5, 6]
    assert shapes["fused"]["each.experts.3.weight"] == [6, 6]
    per_expert = shapes["per_expert"]
    assert per_expert["mlp.experts.3.htoh4.weight"] == [1, 5, 6]
    assert per_expert["mlp.experts.0.htoh4.bias"] == [1, 5]
    assert per_expert["mlp.experts.1.h4toh.weight"] == [1, 6, 5]
    assert per_expert["mlp.experts.2.h4toh.bias"] == [1, 6]
    assert per_expert["copies.experts.2.htoh4.weight"] == [1, 10, 6]
    assert "mlp.experts.w_up" not in per_expert
    state = merged["optimizer"]["state"]["mlp.experts.3.htoh4.weight"]
    assert list(state["exp_avg"].shape) == [1, 5, 6]
    assert state["step"] == 2
    with pytest.raises(ValueError, match=r"layout must be one of .* got 'both'"):
        merge_checkpoint(saved, tmp_path / "out.pt", "both")


def test_other_optimizers_and_no_state(tmp_path):
    torch.manual_seed(0)
    model = FMoETransformerMLP(3, 4, 5, activation="relu", top_k=2, bias=False)
    for make in (
        torch.optim.Adafactor,
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.5), capturable=False),
    ):
        optimizer = make(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(7, 4)).square().sum().backward()
            optimizer.step()
        save_checkpoint(tmp_path / "saved", model, optimizer)
        for layout in ("fused", "per_expert"):
            merge_checkpoint(tmp_path / "saved", tmp_path / f"{layout}.pt", layout)
        for path in ("saved", "fused.pt", "per_expert.pt"):
            clone = FMoETransformerMLP(3, 4, 5, activation="relu", top_k=2, bias=False)
            other = make(clone.parameters())
            load_checkpoint(tmp_path / path, clone, other)
            found, expected = other.state_dict(), optimizer.state_dict()
            assert found["param_groups"] == expected["param_groups"]
            assert found["state"].keys() == expected["state"].keys()
            for index, entries in expected["state"].items():
                assert found["state"][index].keys() == entries.keys()
                for key, value in entries.items():
                    loaded = found["state"][index][key]
                    same = torch.equal(loaded, value) if torch.is_tensor(value) else loaded == value
                    assert same, key


def test_state_that_mixes_experts_is_not_split(tmp_path):
    model = FMoETransformerMLP(3, 4, 5, top_k=2)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.randn(7, 4)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "saved", model, optimizer)
    # A bias [E, D] looks like a matrix to Adafactor, which keeps one row for all experts.
    with pytest.raises(NotImplementedError, match=r"experts.b_\w+/col_var"):
        merge_checkpoint(tmp_path / "saved", tmp_path / "out.pt", "per_expert")
    assert not (tmp_path / "out.pt").exists()


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="path must be a folder or not exist"):
        save_checkpoint(tmp_path / "file", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="file is damaged or no checkpoint: the file must be"):
        load_checkpoint(tmp_path / "file", nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint"):
        load_checkpoint(tmp_path / "nothing", nn.Linear(2, 2))
