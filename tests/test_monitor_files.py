"""What LoadMonitor writes: CSV, TensorBoard, heat maps; and what it refuses."""

from __future__ import annotations

import csv
import math
import sys

import pytest
import torch
from torch import nn

from moeops import FMoE, FMoETransformerMLP, LoadMonitor
from moeops.gates import (
    GShardGate,
)
from monitor_checks import D, E, Model


def fake_monitor(loads=([4, 0, 2, 2], [1, 1])):
    """A model whose counters hold given loads."""
    layers = [FMoETransformerMLP(len(row), D, 4, top_k=1) for row in loads]
    model = nn.ModuleDict({f"block{i}": layer for i, layer in enumerate(layers)})
    monitor = LoadMonitor(model)
    for (_, counter), row in zip(monitor._watched.values(), loads, strict=True):
        total = sum(row)
        values = [*row, total, total + 2, 2, 0, 1]
        counter.totals.copy_(torch.tensor(values, dtype=torch.float64))
    return monitor


def test_csv(tmp_path):
    path = tmp_path / "load.csv"
    monitor = fake_monitor()
    monitor.write_csv(path, 10)
    monitor.reset()
    monitor.write_csv(path, 20)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["layer"]) for row in rows] == [
        ("10", "block0"), ("10", "block1"), ("20", "block0"), ("20", "block1"),
    ]  # fmt: skip
    assert rows[0]["loads"] == "4 0 2 2"
    assert (rows[0]["tokens"], rows[0]["dropped"], rows[0]["num_dead"]) == ("8", "0.2", "1")
    assert float(rows[0]["max_over_mean"]) == 2
    assert float(rows[1]["entropy"]) == 1
    assert rows[2]["cv"] == "nan"
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"write_csv: path must be .*other\.csv.* 'a,b'"):
        monitor.write_csv(other, 1)
    assert other.read_text() == "a,b\n1,2\n"


class FakeWriter:
    """What the monitor uses of a SummaryWriter."""

    def __init__(self):
        self.scalars, self.histograms, self.flushes = {}, {}, 0

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def add_histogram_raw(self, tag, **values):
        self.histograms[tag] = values

    def flush(self):
        self.flushes += 1


def test_tensorboard_values():
    writer = FakeWriter()
    fake_monitor(([4, 0, 2, 2], [0, 0])).write_tensorboard(writer, 7)
    assert writer.scalars["block0/max_over_mean", 7] == 2
    assert writer.scalars["block0/dropped", 7] == 0.2
    assert writer.scalars["block0/num_dead", 7] == 1
    histogram = writer.histograms["block0/loads"]
    assert histogram["bucket_counts"] == [4, 0, 2, 2]
    assert histogram["bucket_limits"] == [1, 2, 3, 4]
    assert (histogram["num"], histogram["sum"], histogram["sum_squares"]) == (8, 10, 26)
    assert set(writer.histograms) == {"block0/loads"}  # nothing to draw of a layer without tokens
    assert writer.flushes == 1


def test_tensorboard_folder(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = fake_monitor()
    for step in (1, 2):
        monitor.write_tensorboard(tmp_path, step)
    monitor.remove()
    assert len(list(tmp_path.iterdir())) == 1
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("block0/max_over_mean")] == [(1, 2), (2, 2)]
    assert len(events.Histograms("block0/loads")) == 2


def test_heat_map(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib")
    drawn = []
    axes = pytest.importorskip("matplotlib.axes").Axes
    show = axes.imshow
    monkeypatch.setattr(
        axes, "imshow", lambda self, rows, **kw: drawn.append(rows) or show(self, rows, **kw)
    )
    fake_monitor().heat_map(tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert drawn[0][0] == [2, 0, 1, 1]
    assert drawn[0][1][:2] == [1, 1]
    assert all(math.isnan(value) for value in drawn[0][1][2:])
    empty = fake_monitor()
    empty.reset()
    empty.heat_map(tmp_path / "empty.svg")
    assert b"<svg" in (tmp_path / "empty.svg").read_bytes()
    assert figure is not None


@pytest.mark.parametrize(
    ("package", "call", "match"),
    [
        (
            "torch.utils.tensorboard",
            lambda m, p: m.write_tensorboard(p, 1),
            "pip install tensorboard",
        ),
        ("matplotlib.figure", lambda m, p: m.heat_map(p / "x.png"), "pip install matplotlib"),
    ],
    ids=["tensorboard", "matplotlib"],
)
def test_missing_packages_are_named(package, call, match, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=match):
        call(fake_monitor(), tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: LoadMonitor("model"), TypeError, r"LoadMonitor: model must be .* got str"),
        (lambda: LoadMonitor(nn.Linear(2, 2)), ValueError, r"must have an FMoE layer.* in Linear"),
        (lambda: LoadMonitor(Model(), "eval"), ValueError, r"mode must be one of .* got 'eval'"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_model_moved_after_is_refused():
    model = Model()
    LoadMonitor(model)
    with pytest.raises(RuntimeError, match=r"must stay on cpu.* got tokens on meta"):
        model.to("meta")(torch.randn(3, D, device="meta"))


def test_names_and_other_layers():
    """Any FMoE is watched, under the name it has without torch's wrappers."""
    inner = nn.ModuleDict({"moe": FMoE(E, D, expert=lambda d: nn.Linear(d, d), gate=GShardGate)})
    model = torch.compile(
        nn.Sequential(torch.compile(inner["moe"], backend="eager")), backend="eager"
    )
    assert list(LoadMonitor(model).summary()) == ["0"]
    assert list(LoadMonitor(inner).summary()) == ["moe"]
