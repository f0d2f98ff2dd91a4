"""Pictures of a schedule, and what a profiler says of a step."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
import torch

import moeops
from cases import each
from moeops.cost.pipeline import Pipeline, Stage

LINK, EXPERTS = Stage(0.001, 0.004), Stage(0.001, 0.008)


def predicted() -> dict:
    inside = Stage(0.0005, 0.001)
    forward = Pipeline(LINK, inside, inside, EXPERTS)
    backward = Pipeline(LINK, inside, inside, EXPERTS.repeated(2), all_reduce_seconds=0.003)
    return {"forward": forward.timeline(2), "backward": backward.timeline(3)}


def step(layer, x):
    return lambda: layer(x).square().sum()


def test_a_profiled_step_says_what_ran_in_each_direction(tmp_path):
    layer = moeops.FMoETransformerMLP(4, 8, 16)
    x = torch.randn(12, 8, requires_grad=True)
    trace = tmp_path / "trace.json.gz"
    measured = moeops.compile.measured_tasks(step(layer, x), trace=trace)
    assert measured == moeops.compile.tasks_of_trace(trace)
    assert list(measured) == ["forward", "backward"]
    names = {way: {task.name for task in tasks} for way, tasks in measured.items()}
    assert "moeops::moe_mlp" in names["forward"]
    assert any("moe_mlp" in name.lower() for name in names["backward"])
    assert not any(name.startswith("moeops timeline") for way in names.values() for name in way)
    for tasks in measured.values():
        assert {task.lane for task in tasks} == {"host"}
        assert all(0 <= task.start <= task.end for task in tasks)
        assert [task.start for task in tasks] == sorted(task.start for task in tasks)
    assert x.grad is not None


def event(name, cat, start, duration, tid=1, **args) -> dict:
    """Of a trace, in microseconds."""
    return {
        "ph": "X", "name": name, "cat": cat, "ts": start, "dur": duration, "pid": 1, "tid": tid, "args": args,
    }  # fmt: skip


@each("suffix", [".json", ".json.gz"])
def test_a_trace_of_a_gpu_is_read_by_stream(tmp_path, suffix):
    """Kernels and copies within the marks of the host; not the host's ops, nor the marks' copies on the GPU."""
    mark = "moeops timeline: "
    events = [
        event(mark + "forward", "user_annotation", 1000, 500),
        event(mark + "forward", "gpu_user_annotation", 1010, 480, tid=7),
        event("aten::mm", "cpu_op", 1001, 10),
        event("warm", "kernel", 900, 50, tid=7, stream=7),
        event("gemm", "kernel", 1100, 200, tid=7, stream=7),
        event("ncclDevKernel_SendRecv", "kernel", 1050, 300, tid=20, stream=20),
        event("gemm", "kernel", 1300, 100, tid=7, stream=7),
        event("Memcpy DtoH", "gpu_memcpy", 1020, 5, tid=7, stream=7),
        {"ph": "M", "name": "process_name", "pid": 1},
        event(mark + "backward", "user_annotation", 2000, 100),
        event("gemm", "kernel", 2010, 50, tid=7, stream=7),
    ]
    path = tmp_path / f"trace{suffix}"
    raw = json.dumps({"traceEvents": events}).encode()
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    found = moeops.compile.tasks_of_trace(path)
    assert [(*task[:3], *(round(1e6 * t) for t in task[3:])) for task in found["forward"]] == [
        ("stream 7", "Memcpy DtoH", 0, 20, 25),
        ("stream 20", "ncclDevKernel_SendRecv", 0, 50, 350),
        ("stream 7", "gemm", 0, 100, 300),
        ("stream 7", "gemm", 1, 300, 400),
    ]
    assert [task.lane for task in found["backward"]] == ["stream 7"]


def test_what_is_no_trace_is_refused(tmp_path):
    for text, said in (
        ("no JSON", "no JSON of a trace"),
        ("[1]", "no JSON of a trace"),
        (
            json.dumps({"traceEvents": [event("x", "cpu_op", 0, 1)]}),
            "no mark of the forward in 1 events",
        ),
    ):
        path = tmp_path / "trace.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"tasks_of_trace: path must be .* got {said}"):
            moeops.compile.tasks_of_trace(path)
    with pytest.raises(OSError, match="none"):
        moeops.compile.tasks_of_trace(tmp_path / "none.json")


def test_the_picture_has_a_row_for_each_lane_and_the_prediction_above(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `examples`")
    layer = moeops.FMoETransformerMLP(4, 8, 16)
    x = torch.randn(12, 8, requires_grad=True)
    measured = moeops.compile.measured_tasks(step(layer, x))
    path = tmp_path / "timeline.png"
    figure = moeops.compile.timeline(predicted(), measured, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "forward, predicted", "backward, predicted", "forward, measured", "backward, measured",
    ]  # fmt: skip
    lanes = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert [set(names) for names in lanes] == [{"between", "inside", "device"}] * 2 + [{"host"}] * 2
    for axes, tasks in zip(figure.axes, [*predicted().values(), *measured.values()], strict=True):
        bars = [bar for bar in axes.patches if bar.get_width() > 0]
        assert len(bars) == sum(task.end > task.start for task in tasks)
        ends = max(bar.get_x() + bar.get_width() for bar in bars)
        assert ends == pytest.approx(1e3 * max(task.end for task in tasks))
    alone = moeops.compile.timeline({"forward": predicted()["forward"]})
    assert [axes.get_title() for axes in alone.axes] == ["forward, predicted"]
    (legend,) = alone.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "dispatch", "all_gather", "experts", "reduce_scatter", "combine",
    }  # fmt: skip
    (legend,) = figure.legends
    assert legend.get_texts()[-1].get_text() == "others"


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r'by "forward" and "backward", got \[\'sideways\'\]'):
        moeops.compile.timeline({"sideways": []})
    with pytest.raises(ValueError, match=r"measured must have tasks"):
        moeops.compile.timeline(predicted(), {})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib must be installed, got none"):
        moeops.compile.timeline(predicted())
