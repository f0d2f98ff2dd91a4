"""The load monitor: what it counts against straight-line counting, and that a step does not notice it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from host_syncs import no_host_syncs
from moeops import LayerLoad, LoadMonitor
from moeops.gates import (
    ExpertChoiceGate,
    NaiveGate,
    ReMoEGate,
    SoftMoEGate,
)
from monitor_checks import D, E, Model, assert_counts, layer_with, make_batches, straight_line


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
    with no_host_syncs():
        model(x).sum().backward()
        monitor.reset()
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
    model.first(torch.randn(5, D), mask=torch.tensor([0, 1, 0, 1, 0]))
    load = monitor.summary()["first"]
    assert (load.tokens, load.slots, load.without_expert, float(load.loads.sum())) == (3, 6, 0, 6)


def test_copies_and_pickles_go_unwatched():
    model = Model()
    monitor = LoadMonitor(model)
    names = set(Model().state_dict())
    assert set(model.state_dict()) == names
    x = torch.randn(5, D)
    for other in (copy.deepcopy(model.first), pickle.loads(pickle.dumps(copy.copy(model.first)))):
        torch.testing.assert_close(other(x), model.first(x))
    assert monitor.summary()["first"].tokens == 10  # the model's own two forwards
