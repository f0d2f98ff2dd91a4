"""ReMoEGate against straight-line float64, and its coefficient over time."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from choice_checks import check_values, refuses_nan
from gate_checks import D, E, check_checkpoint, check_compile, check_export, gradcheck, layer_with
from torch import nn
from torch._dynamo.utils import counters

from cases import each
from moeops.gates import ReMoEGate, update_coefficients
from reference_gates import variable as reference
from tolerances import assert_close

CASES = {
    "plain": (2, {"balance": False, "coefficient": 0.5}),
    "balanced": (3, {"coefficient": 0.5}),
    "limited": (1, {"max_k": 2, "coefficient": 0.25}),
    "budget": (2, {"row_budget": 2.0, "coefficient": 0.25}),
    "both": (1, {"max_k": 4, "row_budget": 1.3, "coefficient": 0.25}),
}


@each("training", [True, False], ids=["train", "eval"])
@each("name", CASES)
def test_values_and_gradients(name, training, dtype, device):
    T = 13
    k, options = CASES[name]
    gate = ReMoEGate(D, E, 1, k, gate_bias=name == "balanced", **options).train(training)
    found = {}

    def wanted(logits):
        ids, weights, loss, found["lost"] = reference.remoe(logits, k, **options)
        found["active"] = int((logits > 0).sum())
        return ids, weights, loss

    routing = check_values(gate, wanted, dtype, device, T)
    assert int(gate.dropped) == found["lost"]
    assert (found["lost"] > 0) == ("row_budget" in options)
    if found["lost"]:
        assert int((routing.topk_ids >= 0).sum()) == routing.num_rows
    counts = [int(gate.active), int(gate.tokens)]
    assert counts == ([found["active"], T] if training else [0, 0])


@pytest.mark.parametrize("name", ["plain", "limited"])
def test_gradcheck(name):
    k, options = CASES[name]
    gradcheck(ReMoEGate(D, E, 1, k, **options))


def test_no_tokens(device):
    gate = ReMoEGate(D, E, row_budget=1.5).to(device)
    ids, _, num_rows, _ = gate(torch.randn(0, D, device=device))
    assert ids.shape == (0, E)
    assert num_rows == 0
    assert float(gate.get_loss().detach()) == 0
    before = float(gate.coefficient)
    gate.update_coefficient()
    assert float(gate.coefficient) == before


def test_nan_is_refused():
    refuses_nan(ReMoEGate(D, E))


def test_update_raises_lowers_and_keeps(device):
    gate = ReMoEGate(D, E, top_k=2, coefficient=1.0).to(device)
    for active, want in ((21, 1.5), (19, 1.0), (20, 1.0), (0, 1 / 1.5)):
        gate.active.fill_(active)
        gate.tokens.fill_(10)
        gate.update_coefficient(1.5)
        assert_close(gate.coefficient, torch.tensor(want), torch.float32)
        assert int(gate.active) == int(gate.tokens) == 0


def test_all_gates_of_a_model_share_their_counts():
    model = nn.ModuleList(ReMoEGate(D, E, top_k=2, coefficient=1.0) for _ in range(3))
    for gate, active in zip(model, (50, 0, 0), strict=True):
        gate.active.fill_(active)
        gate.tokens.fill_(10)
    update_coefficients(model, 2.0)  # 50 of 60
    assert [float(gate.coefficient) for gate in model] == pytest.approx([0.5] * 3)
    assert [int(gate.active) for gate in model] == [0] * 3
    with pytest.raises(ValueError, match=r"model must hold a ReMoEGate, got Linear without one"):
        update_coefficients(nn.Linear(2, 2))


def test_update_compiles_into_one_graph():
    gate = ReMoEGate(D, E, coefficient=0.5)
    other = copy.deepcopy(gate)
    torch._dynamo.reset()
    counters.clear()

    def step(gate, x):
        total = gate(x).topk_weights.sum() + gate.get_loss()
        gate.update_coefficient(1.2)
        return total

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(9, D)
        assert_close(compiled(gate, x), step(other, x), torch.float32)
    assert_close(gate.coefficient, other.coefficient, torch.float32)
    assert float(gate.coefficient) != 0.5
    assert counters["stats"]["unique_graphs"] == 1


def test_update_between_forward_and_backward_does_not_reach_the_loss():
    gate = ReMoEGate(D, E, coefficient=0.5)
    x = torch.randn(9, D)
    gate(x)
    gate.get_loss().backward()
    want = gate.gate.weight.grad.clone()
    gate.zero_grad()
    gate(x)
    gate.update_coefficient()
    loss = gate.get_loss()
    loss.backward()
    assert torch.equal(gate.gate.weight.grad, want)


def test_training_reaches_the_target_sparsity():
    build = partial(ReMoEGate, coefficient=0.01, gate_bias=True)
    layer = layer_with(build, top_k=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    average = []
    for _ in range(250):
        x = torch.randn(256, D)
        optimizer.zero_grad()
        ((layer(x) - x.roll(1, 1)).square().mean() + layer.gate.get_loss()).backward()
        optimizer.step()
        average.append(int(layer.gate.active) / int(layer.gate.tokens))
        layer.gate.update_coefficient(1.05)
    assert average[0] > 2.5
    assert abs(sum(average[150:]) / 100 - 2) < 0.3


def test_coefficient_stays_where_it_can_come_back_from():
    gate = ReMoEGate(D, E, top_k=2)
    for active in (100, 0):
        for _ in range(600):
            gate.active.fill_(active)
            gate.tokens.fill_(10)
            gate.update_coefficient(1.2)
        assert float(gate.coefficient) == pytest.approx(1e20 if active else 1e-20)


def test_coefficient_keeps_its_type_and_value(tmp_path):
    gate = ReMoEGate(D, E).to(torch.float16)  # 1e-8 is 0 in float16
    assert gate.coefficient.dtype == torch.float32
    assert float(gate.coefficient) == pytest.approx(1e-8)
    assert gate.gate.weight.dtype == torch.float16
    assert set(gate.state_dict()) == {"gate.weight", "coefficient", "active", "tokens"}
    meta = ReMoEGate(D, E, top_k=1).to("meta").to(torch.bfloat16)
    assert meta.coefficient.dtype == torch.float32


FULL = partial(ReMoEGate, row_budget=1.5, max_k=4, coefficient=0.01)


@pytest.mark.parametrize(
    ("build", "backend"), [(FULL, "inductor"), (ReMoEGate, "aot_eager")], ids=["full", "plain"]
)
def test_compile(build, backend, device):
    check_compile(build, device, backend)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(FULL, device, strict, training=True)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_checkpoint(compile_it):
    check_checkpoint(FULL, compile_it)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_k": 1}, ValueError, r"max_k must be at least 2, got 1"),
        ({"max_k": 7}, ValueError, r"max_k must be at most the 6 experts, got 7"),
        ({"max_k": 2.5}, TypeError, r"max_k must be an int, got 2\.5"),
        ({"coefficient": 0}, ValueError, r"coefficient must be above 0 and finite, got 0"),
        ({"row_budget": -1.0}, ValueError, r"row_budget must be None or above 0 .* got -1\.0"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=f"ReMoEGate: {match}"):
        ReMoEGate(D, E, **options)


@pytest.mark.parametrize("rate", [0.9, float("nan"), float("inf")])
def test_bad_rate(rate):
    with pytest.raises(ValueError, match=r"rate must be at least 1 and finite, got"):
        ReMoEGate(D, E).update_coefficient(rate)
