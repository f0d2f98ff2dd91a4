"""Layers with every record that a gate may return, against dense float64 mixtures."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from layer_cases import LAYERS, D, E, make_layer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cases import each
from host_syncs import no_host_syncs
from moeops import FMoE, FMoELinear, Routing, SlotRouting
from moeops.dispatch.local import Dispatcher, LocalDispatcher
from moeops.gates import ExpertChoiceGate, Llama4Gate, ReMoEGate, SoftMoEGate, ThresholdGate
from moeops.layers import FusedExperts
from reference_gates import variable as reference
from tolerances import assert_close

T, K, S = 11, 3, 2


class Fixed(nn.Module):
    """A gate that returns the same record for any tokens; its weights are a parameter."""

    def __init__(self, record):
        super().__init__()
        self.record = record
        names = ("topk_weights",) if isinstance(record, Routing) else record._fields[:2]
        for name in names:
            self.register_parameter(name, nn.Parameter(getattr(record, name).clone()))

    def forward(self, x):
        return self.record._replace(**dict(self.named_parameters()))


def some_ids():
    """Some slots of some tokens, none of others; no expert twice."""
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    ids[torch.rand(T, K) < 0.4] = -1
    ids[4] = -1
    return ids


def records():
    weights = torch.rand(T, K, dtype=torch.float64) + 0.5
    ids = some_ids()
    live = int((ids >= 0).sum())
    single = ids[:, :1]
    slots = [torch.softmax(torch.randn(T, E * S, dtype=torch.float64), dim) for dim in (0, 1)]
    return {
        "plain": Routing(ids, weights),
        "exact_rows": Routing(ids, weights, live),
        "spare_rows": Routing(ids, weights, live + 3),
        "inputs": Routing(ids, weights, None, True),
        "inputs_rows": Routing(ids, weights, live, True),
        "one_input": Routing(single, weights[:, :1], None, True),
        "slots": SlotRouting(*slots),
        "slots_groups": SlotRouting(*slots, 4),
        "slots_one_group": SlotRouting(*slots, 20),
    }


NAMES = list(records())


def record_of(name, device):
    torch.manual_seed(3)
    record = records()[name]
    return type(record)(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in record))


def expert_of(layer, kind, e):
    """Expert ``e`` alone, as a function of rows: the layer itself with every row sent there."""
    if kind == "modules":
        return layer.experts[e]

    def apply(x):
        rows = [0] * (e + 1) + [x.shape[0]] * (E - e)
        offsets = torch.tensor(rows, dtype=torch.int32, device=x.device)
        return layer.experts(x, expert_offsets=offsets)

    return apply


def mixture(record, experts, x):
    """What the record means, without a dispatch."""
    if isinstance(record, SlotRouting):
        return reference.soft_mixture(x, record[0], record[1], experts, record.tokens_per_group)
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        for k in range(record.topk_ids.shape[1]):
            chosen = (record.topk_ids[:, k] == e)[:, None]
            weight = record.topk_weights[:, k, None]
            out = expert(weight * x) if record.scale_inputs else weight * expert(x)
            y = y + torch.where(chosen, out, 0)
    return y


def layer_for(kind, name, device, **options):
    gate = Fixed(record_of(name, device))
    return make_layer(kind, lambda *args: gate, device, **options).double()


@each("name", NAMES)
@each("kind", LAYERS)
def test_values_and_gradients(kind, name, device):
    layer = layer_for(kind, name, device)
    x = torch.randn(T, D, dtype=torch.float64, device=device, requires_grad=True)
    experts = [expert_of(layer, kind, e) for e in range(E)]
    y, want = layer(x), mixture(layer.gate(x), experts, x)
    assert_close(y, want, torch.float64)
    leaves = [x, *layer.parameters()]
    factors = torch.randn_like(y)
    grads = torch.autograd.grad((y * factors).sum(), leaves)
    wanted = torch.autograd.grad((want * factors).sum(), leaves)
    for grad, expected in zip(grads, wanted, strict=True):
        assert_close(grad, expected, torch.float64)


@each("name", NAMES)
@each("kind", LAYERS)
def test_masks(kind, name, device):
    row = torch.randn(D, dtype=torch.float64, device=device)
    layer = layer_for(kind, name, device, mask_dict={1: 0.5, 2: row})
    x = torch.randn(T, D, dtype=torch.float64, device=device)
    mask = torch.tensor([0, 1, 0, 2, 1, 3, 0, 0, 2, 0, 1], device=device)
    record = layer.gate(x)
    kept = (mask == 0)[:, None]
    if isinstance(record, SlotRouting):
        # The rest of a slot's tokens, in its group, keep the sum of its weights.
        size = record.tokens_per_group or T
        dispatch = torch.where(kept, record[0], 0)
        for begin in range(0, T, size):
            rows = slice(begin, begin + size)
            dispatch[rows] *= record[0][rows].sum(0) / dispatch[rows].sum(0)
        plain = SlotRouting(dispatch, record[1], record.tokens_per_group)
        total = record[1].sum(1, keepdim=True)
    else:
        plain = record._replace(topk_ids=torch.where(kept, record[0], -1))
        weights = torch.ones_like(record[1]) if record.scale_inputs else record[1]
        total = weights.sum(
            1, keepdim=True
        )  # of empty slots too: nothing of a masked token is dropped
    experts = [expert_of(layer, kind, e) for e in range(E)]
    want = torch.where(kept, mixture(plain, experts, x), 0)
    want = torch.where((mask == 1)[:, None], 0.5 * total.expand(-1, D), want)
    want = torch.where((mask == 2)[:, None], row * total, want)
    assert_close(layer(x, mask), want, torch.float64)


@each("name", NAMES)
def test_gate_hook(name):
    seen = []
    layer = layer_for("mlp", name, "cpu", gate_hook=lambda *args: seen.append(args))
    layer(torch.randn(T, D, dtype=torch.float64))
    ((first, second, nothing),) = seen
    record = layer.gate(None)
    assert torch.equal(first, record[0])
    assert torch.equal(second, record[1])
    assert nothing is None


class Fused(FMoE):
    """A subclass with its own module for rows and counts."""

    def __init__(self, **options):
        super().__init__(expert=None, **options)
        self.experts = FMoELinear(self.num_expert, self.d_model, D, dtype=torch.float64)


@each("name", NAMES)
def test_subclass_with_fused_experts(name, device):
    layer = Fused(num_expert=E, d_model=D, gate=Fixed(record_of(name, "cpu"))).to(device)
    layer.gate.record = record_of(name, device)
    x = torch.randn(T, D, dtype=torch.float64, device=device)
    weight, bias = layer.experts.weight, layer.experts.bias
    experts = [lambda x, e=e: x @ weight[e].t() + bias[e] for e in range(E)]
    assert_close(layer(x), mixture(layer.gate(x), experts, x), torch.float64)


class Nested(nn.Module):
    """Reads a nest of tokens, an image per token and a number per token; returns a nest of two."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, inp):
        hidden = self.linear(inp["a"])
        image = inp["image"] * (1 + inp["number"][:, None, None])
        return hidden, {"image": image + hidden.mean(1)[:, None, None]}


@each("number", [torch.float64, torch.int64])
@each("name", NAMES)
def test_nests(name, number, device):
    layer = FMoE(E, D, gate=Fixed(record_of(name, device)), expert=Nested).to(device, torch.float64)
    inp = {
        "a": torch.randn(T, D, dtype=torch.float64, device=device),
        "image": torch.randn(T, 2, 3, dtype=torch.float64, device=device),
        "number": torch.randint(3, (T,), device=device).to(number),
    }
    record = layer.gate(inp["a"])
    if isinstance(record, SlotRouting) and number == torch.int64:
        with pytest.raises(TypeError, match=r"moe_inp must hold float tensors .* got torch\.int64"):
            layer(inp)
        return
    # All columns in one tensor; of weighted inputs the first leaf is scaled, and it alone.
    columns = torch.cat([v.double().reshape(T, -1) for v in inp.values()], 1)

    def flat(expert):
        def apply(rows):
            nest = {
                "a": rows[:, :D],
                "image": rows[:, D:-1].reshape(-1, 2, 3),
                "number": rows[:, -1],
            }
            hidden, rest = expert(nest)
            return torch.cat((hidden, rest["image"].reshape(-1, 6)), 1)

        return apply

    experts = [flat(expert) for expert in layer.experts]
    if isinstance(record, SlotRouting):
        want = reference.soft_mixture(
            columns, record[0], record[1], experts, record.tokens_per_group
        )
    else:
        want = 0
        for e, expert in enumerate(experts):
            for k in range(record.topk_ids.shape[1]):
                weight = torch.where(record.topk_ids == e, record.topk_weights, 0)[:, k, None]
                if record.scale_inputs:
                    scaled = torch.cat((weight * columns[:, :D], columns[:, D:]), 1)
                    want = want + torch.where(weight != 0, expert(scaled), 0)
                else:
                    want = want + weight * expert(columns)
    hidden, rest = layer(inp)
    assert_close(hidden, want[:, :D], torch.float64)
    assert_close(rest["image"], want[:, D:].reshape(T, 2, 3), torch.float64)


@each("name", NAMES)
def test_experts_work_on_the_rows_they_need(name):
    record = record_of(name, "cpu")
    if isinstance(record, Routing):
        record = record._replace(scale_inputs=False)
        want = record.topk_ids.numel() if record.num_rows is None else record.num_rows
    else:
        want = {None: 1, 4: 3, 20: 1}[record.tokens_per_group] * E * S
    dispatcher = LocalDispatcher(E)
    x = torch.randn(T, D, dtype=torch.float64)
    rows, offsets, kept = dispatcher.dispatch(record, x)
    assert rows.shape == (want, D)
    assert offsets.dtype == torch.int32
    assert offsets.shape == (E + 1,)
    same = [lambda x: x] * E
    assert_close(dispatcher.combine(rows, kept), mixture(record, same, x), torch.float64)


class Backwards(Dispatcher):
    """Another dispatcher: it has its own record and no block."""

    def __init__(self, num_experts):
        self.local = LocalDispatcher(num_experts)
        self.calls = 0

    def dispatch(self, routing, inp):
        self.calls += 1
        rows, offsets, record = self.local.dispatch(routing, inp)
        return rows, offsets, {"mine": record}

    def combine(self, out, record):
        return self.local.combine(out, record["mine"])


@each("name", NAMES)
@each("kind", LAYERS)
def test_layers_take_other_dispatchers(kind, name):
    layer = layer_for(kind, name, "cpu")
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    want = layer(x)
    wanted = torch.autograd.grad(want.square().sum(), [x, *layer.parameters()])
    layer.dispatcher = Backwards(E)
    y = layer(x)
    assert layer.dispatcher.calls == 1
    assert_close(y, want, torch.float64)
    grads = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    for grad, expected in zip(grads, wanted, strict=True):
        assert_close(grad, expected, torch.float64)


def test_dispatcher_without_methods():
    for call in (lambda d: d.dispatch(None, None), lambda d: d.combine(None, None)):
        with pytest.raises(NotImplementedError, match=r"Dispatcher: .* must be written"):
            call(Dispatcher())


@each("activation", ["swiglu", torch.sin], ids=["fused", "composed"])
def test_fused_experts_on_rows(activation, dtype, device):
    experts = FusedExperts(E, D, 12, activation, dtype=dtype, device=device)
    rows = torch.randn(9, D, device=device).to(dtype)
    offsets = torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32, device=device)
    y = experts(rows, expert_offsets=offsets)
    # The same rows as tokens with one expert each; the last one belongs to nobody.
    ids = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3, -1], device=device)[:, None]
    plan = LocalDispatcher(E)._plan(Routing(ids, ids))
    assert_close(y, experts(rows, torch.ones(9, 1, device=device), plan), dtype)
    assert torch.equal(y[8], torch.zeros_like(y[8]))
    for arguments in ((rows,), (rows, torch.ones(9, 1)), (rows, None, plan)):
        with pytest.raises(TypeError, match=r"FusedExperts: topk_weights and plan must be given"):
            experts(*arguments)
    with pytest.raises(TypeError, match=r"expert_offsets alone for rows"):
        experts(rows, torch.ones(9, 1), plan, expert_offsets=offsets)


GATES = {
    "expert_choice": ExpertChoiceGate,
    "soft": partial(SoftMoEGate, num_slots=2),
    "llama4": Llama4Gate,
    "remoe": partial(ReMoEGate, row_budget=1.5),
    "threshold": partial(ThresholdGate, top_p=0.7, row_budget=1.2),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["composed", "modules"])
def test_one_graph_for_all_token_counts(kind, gate, device):
    """The fused layer's turn is in tests/gates."""
    layer = make_layer(kind, GATES[gate], device, mask_dict={1: 0.5}).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (5, 12, 1, 0, 33):
        leaves = [torch.randn(tokens, D, device=device) for _ in range(2)]
        leaves[1].copy_(leaves[0])
        mask = torch.randint(2, (tokens,), device=device)
        results = []
        for module, leaf in zip((layer, compiled), leaves, strict=True):
            leaf.requires_grad_()
            marked = mask.clone()
            if module is compiled:
                torch._dynamo.decorators.mark_unbacked(leaf, 0)
                torch._dynamo.decorators.mark_unbacked(marked, 0)
            y = module(leaf, marked)
            layer.gate.get_loss()
            y.square().sum().backward()
            results.append((y, leaf.grad))
        for actual, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(actual, want, rtol=2e-5, atol=3e-6)
    assert counter.frame_count == 1


@pytest.mark.cuda
@each("gate", GATES)
@each("kind", ["mlp", "composed"])
def test_no_host_sync(kind, gate, cuda_device):
    layer = make_layer(kind, GATES[gate], cuda_device, mask_dict={1: 0.5})
    x = torch.randn(32, D, device=cuda_device, requires_grad=True)
    mask = torch.zeros(32, dtype=torch.int32, device=cuda_device)
    ones = torch.ones(32, D, device=cuda_device)
    layer(x, mask).backward(ones)  # first-call set-up may copy
    with no_host_syncs():
        layer(x, mask).backward(ones)


@each(
    ("output", "error", "match"),
    [
        (lambda i, w: i, TypeError, r"must return \(topk_ids, topk_weights\), a moeops\.Routing .* got Tensor"),
        (lambda i, w: (i, w, w), TypeError, r"must return .* got 3 values"),
        (lambda i, w: None, TypeError, r"must return .* got NoneType"),
        (lambda i, w: Routing(i, w, 2.5), TypeError, r"num_rows must be an int, got 2\.5"),
        (lambda i, w: Routing(i, w, -1), ValueError, r"num_rows must be at least 0, got -1"),
        (lambda i, w: Routing(i, w, 3), RuntimeError, r"num_rows"),
        (lambda i, w: Routing(w, i), TypeError, r"must return int32 or int64 topk_ids"),
        (lambda i, w: SlotRouting(i, w), TypeError, r"must return float dispatch_weights, got torch\.int64"),
        (lambda i, w: SlotRouting(w, w[:4]), ValueError, r"combine_weights of shape \[6, E \* S\], got .*\[4, 3\]"),
        (lambda i, w: SlotRouting(w, w), ValueError, r"a multiple of the 4 experts as the number of slots"),
        (lambda i, w: SlotRouting(w.repeat(1, 4), w), ValueError, r"combine_weights of the shape of dispatch_weights"),
        (
            lambda i, w: SlotRouting(w.repeat(1, 4), w.repeat(1, 4), 0),
            ValueError,
            r"tokens_per_group must be at least 1, got 0",
        ),
    ],
)  # fmt: skip
@each("kind", ["mlp", "modules"])
def test_records_that_do_not_fit(kind, output, error, match):
    ids, weights = torch.zeros(6, 3, dtype=torch.int64), torch.ones(6, 3)

    class Wrong(nn.Module):
        def forward(self, x):
            return output(ids, weights)

    layer = make_layer(kind, lambda *args: Wrong())
    with pytest.raises(error, match=match):
        layer(torch.randn(6, D))
