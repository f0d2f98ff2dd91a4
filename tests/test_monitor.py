"""The load monitor: what it counts against straight-line counting, and that a step does not notice it."""

from __future__ import annotations

import copy
import csv
import io
import math
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moeops import FMoE, FMoETransformerMLP, LayerLoad, LoadMonitor
from moeops.gates import (
    ExpertChoiceGate,
    GShardGate,
    NaiveGate,
    ReMoEGate,
    SoftMoEGate,
    SwitchGate,
)

D, E = 8, 4


def layer_with(gate, top_k=2):
    return FMoETransformerMLP(E, D, 12, top_k=top_k, gate=gate)


class Model(nn.Module):
    """Two layers with different gates, one of which drops."""

    def __init__(self):
        super().__init__()
        self.first = layer_with(NaiveGate)
        self.second = layer_with(lambda *a: SwitchGate(*a, capacity=0.5, switch_eps=0.0), 1)

    def forward(self, x):
        return self.second(self.first(x))


def straight_line(model, batches):
    """Loads, tokens and empty slots of both layers, counted in Python."""
    want = {
        n: {"loads": [0] * E, "tokens": 0, "empty": 0, "without": 0} for n in ("first", "second")
    }
    for x in batches:
        for name in want:
            layer = getattr(model, name)
            ids = layer.gate(x)[0].tolist()
            x = layer(x)
            for row in ids:
                want[name]["tokens"] += 1
                want[name]["without"] += all(i < 0 for i in row)
                for i in row:
                    if i < 0:
                        want[name]["empty"] += 1
                    else:
                        want[name]["loads"][i] += 1
    return want


def assert_counts(summary, want, forwards):
    assert list(summary) == list(want)
    for name, load in summary.items():
        assert load.loads.tolist() == want[name]["loads"]
        assert load.loads.dtype == torch.float64
        assert load.loads.device.type == "cpu"
        assert load.tokens == want[name]["tokens"]
        assert load.empty == want[name]["empty"]
        assert load.slots == sum(want[name]["loads"]) + want[name]["empty"]
        assert load.without_expert == want[name]["without"]
        assert load.forwards == forwards


def make_batches(device="cpu", sizes=(7, 0, 12)):
    return [torch.randn(size, D, device=device) for size in sizes]


def test_counts(device):
    model, batches = Model().to(device), make_batches(device)
    want = straight_line(copy.deepcopy(model), batches)
    monitor = LoadMonitor(model)
    for x in batches:
        model(x).sum().backward()
    assert_counts(monitor.summary(), want, 3)
    assert want["second"]["empty"] > 0
    assert monitor.summary()["first"].experts_per_token == 2
    monitor.reset()
    assert_counts(monitor.summary(), straight_line(model, []), 0)
    for x in batches[:1]:
        model(x)
    assert_counts(monitor.summary(), straight_line(copy.deepcopy(model), batches[:1]), 1)


def test_statistics_by_hand():
    load = LayerLoad(torch.tensor([4.0, 0.0, 2.0, 2.0], dtype=torch.float64), 5, 10, 2, 1, 3)
    assert load.dropped == 0.2
    assert load.unrouted == 0.2
    assert load.experts_per_token == 1.6
    assert load.max_over_mean == 2
    assert load.cv == pytest.approx(math.sqrt(2) / 2)  # variance (4 + 4 + 0 + 0) / 4, mean 2
    assert load.entropy == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert load.dead == [1]
    even = LayerLoad(torch.full((3,), 5.0, dtype=torch.float64), 15, 15, 0, 0, 1)
    assert (even.max_over_mean, even.cv, even.dead, even.dropped) == (1, 0, [], 0)
    assert even.entropy == pytest.approx(1)
    alone = LayerLoad(torch.tensor([0.0, 9.0], dtype=torch.float64), 9, 9, 0, 0, 1)
    assert (alone.max_over_mean, alone.cv, alone.entropy, alone.dead) == (2, 1, 0, [0])
    none = LayerLoad(torch.zeros(2, dtype=torch.float64), 0, 0, 0, 0, 0)
    for name in ("dropped", "unrouted", "experts_per_token", "max_over_mean", "cv", "entropy"):
        assert math.isnan(getattr(none, name)), name
    assert LayerLoad(torch.ones(1, dtype=torch.float64), 1, 1, 0, 0, 1).entropy == 1


@pytest.mark.parametrize("when", ["before compile", "after compile", "after a step"])
def test_one_graph_with_the_counting_in_it(when, device):
    torch._dynamo.reset()
    counters.clear()
    model = Model().to(device)
    batches = make_batches(device, (7, 9, 12, 1, 0, 30))
    want = straight_line(copy.deepcopy(model), batches)
    plain = [copy.deepcopy(model)(x) for x in batches]
    for x in batches:
        torch._dynamo.decorators.mark_unbacked(x, 0)
    monitor = LoadMonitor(model) if when == "before compile" else None
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    if when == "after a step":
        compiled(batches[0])
    if monitor is None:
        monitor = LoadMonitor(compiled)
    for x, y in zip(batches, plain, strict=True):
        result = compiled(x)
        torch.testing.assert_close(result, y, rtol=1e-5, atol=1e-6)
        result.sum().backward()
    assert counter.frame_count == (2 if when == "after a step" else 1)
    assert not counters["graph_break"]
    assert_counts(monitor.summary(), want, len(batches))
    monitor.remove()
    compiled(batches[0])
    assert_counts(monitor.summary(), want, len(batches))
    assert model.first.routing_hooks == ()


def test_layers_compiled_one_by_one_share_a_graph():
    """The usual way to compile a deep model; more layers than Dynamo would recompile for."""
    torch._dynamo.reset()
    layers = [layer_with(NaiveGate) for _ in range(12)]
    model = nn.Sequential(*layers)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(fullgraph=True, backend=counter)
    monitor = LoadMonitor(model)
    x = torch.randn(6, D)
    for _ in range(2):
        model(x).sum().backward()
    assert [load.tokens for load in monitor.summary().values()] == [12] * 12
    assert counter.frame_count <= 2
    assert not counters["graph_break"]


def test_inductor(device):
    torch._dynamo.reset()
    model = Model().to(device).second
    monitor = LoadMonitor(model)
    compiled = torch.compile(model, fullgraph=True)
    batches = make_batches(device)
    with torch.no_grad():
        for x in batches:
            torch._dynamo.decorators.mark_unbacked(x, 0)
            compiled(x)
    ids = torch.cat([model.gate(x)[0] for x in batches])
    load = monitor.summary()[""]
    assert load.loads.tolist() == [float((ids == e).sum()) for e in range(E)]
    assert (load.tokens, load.empty, load.forwards) == (19, int((ids < 0).sum()), 3)


class CountReads(TorchDispatchMode):
    """Sees every read of a tensor's value by Python."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_in_the_step():
    model = Model()
    LoadMonitor(model)
    with CountReads() as mode:
        model(torch.randn(7, D)).sum().backward()
    assert mode.reads == 0


@pytest.mark.cuda
def test_no_synchronisation_in_the_step(cuda_device):
    model, x = Model().to(cuda_device), torch.randn(7, D, device=cuda_device)
    monitor = LoadMonitor(model)
    model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
        monitor.reset()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert monitor.summary()["first"].tokens == 0


@pytest.mark.cuda
def test_cuda_graphs(cuda_device):
    torch._dynamo.reset()
    counters.clear()
    model = Model().to(cuda_device)
    monitor = LoadMonitor(model)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    x = torch.randn(16, D, device=cuda_device)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad(set_to_none=True)  # gradients live in the graphs' memory
        compiled(x).sum().backward()
    assert counters["inductor"]["cudagraph_skips"] == 0
    load = monitor.summary()["first"]
    assert (load.tokens, load.forwards, float(load.loads.sum())) == (80, 5, 160)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_counts_once(compiled, reentrant):
    if compiled and reentrant:
        pytest.skip("torch.compile refuses reentrant checkpoints")
    torch._dynamo.reset()
    model = Model()

    def step(x):
        return checkpoint(model, x, use_reentrant=reentrant)

    monitor = LoadMonitor(model)
    x = torch.randn(9, D, requires_grad=True)
    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        for _ in range(2):
            run(x).sum().backward()
    load = monitor.summary()["first"]
    assert (load.tokens, load.forwards, float(load.loads.sum())) == (18, 2, 36)


@pytest.mark.parametrize(
    ("mode", "tokens"), [("training", 5), ("evaluation", 3), ("all", 8)], ids=lambda v: str(v)
)
def test_modes(mode, tokens):
    model = Model()
    with LoadMonitor(model, mode) as monitor:
        model(torch.randn(5, D))
        model.eval()(torch.randn(3, D))
    model(torch.randn(4, D))  # not watched any more
    assert monitor.summary()["second"].tokens == tokens
    assert model.second.routing_hooks == ()


def test_two_monitors_and_the_users_hook():
    model, seen = Model(), []
    model.first.gate_hook = lambda ids, weights, _: seen.append(ids.shape)
    monitors = [LoadMonitor(model), LoadMonitor(model)]
    model(torch.randn(5, D))
    monitors[0].remove()
    model(torch.randn(2, D))
    assert [m.summary()["first"].tokens for m in monitors] == [5, 7]
    assert seen == [(5, 2), (2, 2)]


def test_expert_choice(device):
    """The experts choose: a bound on the rows says how many slots there are."""
    layer = layer_with(ExpertChoiceGate, top_k=2).to(device)
    monitor = LoadMonitor(layer)
    x = torch.randn(10, D, device=device)
    layer(x)
    ids = layer.gate(x).topk_ids
    load = monitor.summary()[""]
    assert load.loads.tolist() == [5] * E  # 10 tokens * 2 / 4 experts
    assert (load.slots, load.empty, load.tokens) == (20, 0, 10)
    assert load.without_expert == int((ids < 0).all(1).sum())


def test_variable_k(device):
    layer = layer_with(ReMoEGate).to(device)
    monitor = LoadMonitor(layer)
    x = torch.randn(20, D, device=device)
    layer(x)
    ids = layer.gate(x).topk_ids
    load = monitor.summary()[""]
    assert load.loads.tolist() == [float((ids == e).sum()) for e in range(E)]
    assert load.empty == int((ids < 0).sum())
    assert load.without_expert == int((ids < 0).all(1).sum())


def test_mixed_tokens(device):
    """SoftMoE: an expert's load is what the outputs take from it; they add up to the tokens."""
    layer = layer_with(lambda *a: SoftMoEGate(*a, num_slots=3)).to(device)
    monitor = LoadMonitor(layer)
    x = torch.randn(20, D, device=device)
    layer(x).sum().backward()
    weights = layer.gate(x).combine_weights.detach()
    want = [float(weights[:, 3 * e : 3 * e + 3].double().sum()) for e in range(E)]
    load = monitor.summary()[""]
    assert load.loads.tolist() == pytest.approx(want, rel=1e-6)
    assert float(load.loads.sum()) == pytest.approx(20, rel=1e-6)
    assert (load.slots, load.empty, load.without_expert) == (20, 0, 0)


def test_all_kinds_compile_and_export():
    torch._dynamo.reset()
    gates = (ExpertChoiceGate, ReMoEGate, SoftMoEGate)
    model = nn.Sequential(*(layer_with(gate) for gate in gates))
    other = copy.deepcopy(model)
    monitors = [LoadMonitor(model), LoadMonitor(other)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in (6, 11, 20):
        x = torch.randn(size, D)
        other(x)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        compiled(x)
    assert counter.frame_count == 1
    summaries = [monitor.summary() for monitor in monitors]
    for name in ("0", "1", "2"):
        for field in ("tokens", "slots", "empty", "without_expert", "forwards"):
            assert getattr(summaries[0][name], field) == getattr(summaries[1][name], field), field
        torch.testing.assert_close(summaries[0][name].loads, summaries[1][name].loads)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},)).module()
    torch.testing.assert_close(program(x), other(x))
    assert monitors[0].summary()["0"].forwards == 3
    assert not [name for name, _ in program.named_buffers() if "totals" in name]


def test_autocast_and_masks():
    model = Model()
    monitor = LoadMonitor(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(300, D))
    assert monitor.summary()["first"].loads.sum() == 600
    monitor.reset()
    model.first(torch.randn(4, D), mask=torch.tensor([0, 1, 0, 1]))
    assert monitor.summary()["first"].tokens == 4  # what the gate decided


def test_copies_and_pickles_go_unwatched():
    model = Model()
    monitor = LoadMonitor(model)
    names = set(Model().state_dict())
    assert set(model.state_dict()) == names
    x = torch.randn(5, D)
    for other in (copy.deepcopy(model.first), pickle.loads(pickle.dumps(copy.copy(model.first)))):
        torch.testing.assert_close(other(x), model.first(x))
    assert monitor.summary()["first"].tokens == 10  # the model's own two forwards


# --- files -------------------------------------------------------------------------------------------


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


# --- several ranks -----------------------------------------------------------------------------------


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
