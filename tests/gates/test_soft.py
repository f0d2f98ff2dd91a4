"""SoftMoEGate against straight-line float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import refuses_nan
from gate_checks import (
    D,
    E,
    assert_gradient,
    check_checkpoint,
    check_compile,
    check_export,
    layer_with,
    parameters_float64,
)

from cases import each
from moeops import FMoETransformerMLP, SlotRouting
from moeops.gates import SoftMoEGate
from reference_gates import variable as reference
from tolerances import assert_close


def make(slots=2, length=None):
    gate = SoftMoEGate(D, E, num_slots=slots, sequence_length=length)
    with torch.no_grad():
        gate.scale.fill_(3.0)  # far enough from uniform weights to tell formulas apart
    return gate


@each("length", [None, 5, 13, 20, 1])
@each("slots", [1, 2])
def test_values_and_gradients(slots, length, dtype, device):
    gate = make(slots, length).to(device, dtype)
    x = torch.randn(13, D, device=device).to(dtype).requires_grad_()
    router_type = torch.float64 if dtype == torch.float64 else torch.float32
    routing = gate(x)
    assert isinstance(routing, SlotRouting)
    assert routing.tokens_per_group == length
    params = parameters_float64(gate)
    x64 = x.detach().cpu().double().requires_grad_()
    want = reference.soft_moe(x64, params["phi"], params["scale"], length)
    total = want_total = 0
    for actual, wanted, name in zip(routing[:2], want, ("dispatch", "combine"), strict=True):
        assert actual.dtype == router_type
        assert_close(actual, wanted, router_type, name)
        factors = torch.randn(wanted.shape, dtype=torch.float64)
        total = total + (actual * factors.to(actual)).sum()
        want_total = want_total + (wanted * factors).sum()
    total.backward()
    want_total.backward()
    assert_gradient(x.grad, x64.grad, dtype, "gradient of x")
    for name, parameter in gate.named_parameters():
        assert_gradient(parameter.grad, params[name].grad, dtype, f"gradient of {name}")


@pytest.mark.parametrize("length", [None, 2])
def test_gradcheck(length):
    gate = make(1, length).double()
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        names = [name for name, _ in gate.named_parameters()]
        return torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (x,))[:2]

    values = [p.detach().clone().requires_grad_() for p in gate.parameters()]
    assert torch.autograd.gradcheck(function, (x, *values))


def test_sequences_do_not_see_each_other(device):
    layer = layer_with(partial(SoftMoEGate, num_slots=2, sequence_length=4), device).double()
    x = torch.randn(3, 4, D, dtype=torch.float64, device=device)
    y = layer(x)
    for sequence, want in zip(x, y, strict=True):
        assert_close(layer(sequence), want, torch.float64)
    layer.gate.sequence_length = None
    assert not torch.allclose(layer(x), y)


def test_order_of_tokens_does_not_matter():
    layer = layer_with(SoftMoEGate).double()
    x, order = torch.randn(7, D, dtype=torch.float64), torch.randperm(7)
    assert_close(layer(x[order]), layer(x)[order], torch.float64)


@pytest.mark.parametrize("length", [None, 4])
def test_a_masked_token_is_as_good_as_absent(length, device):
    layer = layer_with(partial(SoftMoEGate, num_slots=2, sequence_length=length), device).double()
    layer.mask_dict = {2: 0.5}
    with torch.no_grad():
        layer.gate.scale.fill_(3.0)
    T = 8
    mask = torch.tensor([0, 1, 0, 0, 2, 2, 2, 2] if length else [0, 1, 0, 0, 2, 0, 0, 0]).to(device)
    x = torch.randn(T, D, dtype=torch.float64, device=device, requires_grad=True)
    y = layer(x, mask)
    kept = mask == 0
    # With sequences the second one is masked as a whole.
    layer.gate.sequence_length = None
    assert_close(y[kept], layer(x[kept]), torch.float64)
    assert_close(y[mask == 1], torch.zeros(1, D), torch.float64)
    half = torch.full((int((mask == 2).sum()), D), 0.5)
    assert_close(y[mask == 2], half, torch.float64)
    (grad,) = torch.autograd.grad(y[kept].square().sum(), x)
    assert float(grad[~kept].abs().max()) < 1e-12
    assert bool((grad[kept].abs().sum(1) > 0).all())


def test_zero_tokens_and_a_zero_vector(device):
    layer = layer_with(partial(SoftMoEGate, sequence_length=3), device)
    assert layer(torch.randn(0, D, device=device)).shape == (0, D)
    x = torch.zeros(4, D, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert bool(x.grad.isfinite().all())


def test_the_gate_learns():
    layer = layer_with(partial(SoftMoEGate, num_slots=2))
    layer(torch.randn(9, D)).square().sum().backward()
    assert float(layer.gate.phi.grad.abs().sum()) > 0
    assert float(layer.gate.scale.grad.abs()) > 0


def test_half_types_under_autocast(device):
    layer = layer_with(SoftMoEGate, device)
    x = torch.randn(64, D, device=device)
    want = layer(x)
    with torch.autocast(device, torch.bfloat16):
        routing, y = layer.gate(x), layer(x)
    assert routing.dispatch_weights.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert_close(y, want, torch.bfloat16)


def test_reset_parameters():
    gate = make()
    before = gate.phi.detach().clone()
    gate.reset_parameters()
    assert not torch.equal(gate.phi, before)
    assert float(gate.scale.detach()) == 1


def test_nan_is_refused():
    refuses_nan(SoftMoEGate(D, E))


@pytest.mark.parametrize(
    ("build", "backend"),
    [
        (partial(SoftMoEGate, num_slots=2), "inductor"),
        (partial(SoftMoEGate, sequence_length=4), "aot_eager"),
    ],
    ids=["all", "sequences"],
)
def test_compile(build, backend, device):
    check_compile(build, device, backend)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(partial(SoftMoEGate, num_slots=2), device, strict, training=True)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_of_batches_of_sequences(strict, device):
    gate = partial(SoftMoEGate, sequence_length=4)
    layer = FMoETransformerMLP(E, D, 12, activation="swiglu", gate=gate).to(device)
    sizes = ({0: torch.export.Dim("batch", max=512)},)
    x = torch.randn(3, 4, D, device=device)
    program = torch.export.export(layer, (x,), dynamic_shapes=sizes, strict=strict).module()
    for batch in (1, 2, 5, 0):
        x = torch.randn(batch, 4, D, device=device)
        torch.testing.assert_close(program(x), layer(x))


def test_checkpoint():
    check_checkpoint(partial(SoftMoEGate, sequence_length=4), compile_it=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_slots": 0}, ValueError, r"num_slots must be at least 1, got 0"),
        ({"num_slots": 1.5}, TypeError, r"num_slots must be an int, got 1\.5"),
        ({"sequence_length": 0}, ValueError, r"sequence_length must be at least 1, got 0"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=f"SoftMoEGate: {match}"):
        SoftMoEGate(D, E, **options)
