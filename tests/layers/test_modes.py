"""Layers under autocast, checkpointing, functional_call, deepcopy, pickle and DataParallel."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_cases import GATES, LAYERS, D, E, H, ScaledTanh, assert_same, make_layer, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import each
from moeops import FMoETransformerMLP
from tolerances import assert_close

BOTH = pytest.mark.parametrize("kind", LAYERS)
EVERY_GATE = each("gate", GATES)


@BOTH
@EVERY_GATE
def test_autocast(kind, gate, device):
    layer = make_layer(kind, gate, device).eval()
    x = torch.randn(64, D, device=device)
    expected = run(layer, layer.gate, x)

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast(device, torch.bfloat16):
                return self.layer(x)

    actual = run(Cast(), layer.gate, x)
    actual = {name.removeprefix("layer."): value for name, value in actual.items()}
    assert actual["y"].dtype == torch.bfloat16
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == (torch.bfloat16 if name == "y" else torch.float32)
        assert_close(actual[name], value, torch.bfloat16, name)


@BOTH
@EVERY_GATE
@each("reentrant", [False, True])
def test_activation_checkpointing(kind, gate, reentrant, device):
    layer = make_layer(kind, gate, device)
    x = torch.randn(20, D, device=device)

    def step(checkpointed):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        layer.zero_grad(set_to_none=True)
        y = checkpoint(layer, leaf, use_reentrant=reentrant) if checkpointed else layer(leaf)
        loss = layer.gate.get_loss()
        total = y.square().sum()
        if (
            loss is not None and not reentrant
        ):  # torch's re-entrant kind leaves a loss without gradient
            total = total + loss
        total.backward()
        assert not layer.gate.has_loss
        grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
        return {
            "y": y.detach(),
            "x": leaf.grad,
            **({} if loss is None else {"loss": loss.detach()}),
            **grads,
        }

    assert_same(step(True), step(False))


@BOTH
@EVERY_GATE
def test_functional_call(kind, gate, device):
    layer = make_layer(kind, gate, device)
    other = make_layer(kind, gate, device)
    x = torch.randn(9, D, device=device)
    params = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    torch.manual_seed(1)
    y = torch.func.functional_call(layer, params, (x,))
    torch.manual_seed(1)
    expected = other(x)
    assert_close(y, expected, torch.float32)
    grads = torch.autograd.grad(y.sum(), list(params.values()))
    for grad, parameter in zip(grads, other.parameters(), strict=True):
        (want,) = torch.autograd.grad(expected.sum(), parameter, retain_graph=True)
        assert_close(grad, want, torch.float32)
    assert all(p.grad is None for p in layer.parameters())


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    yield torch.load(buffer, weights_only=False)


@each("kind", ["mlp", "composed"])
@EVERY_GATE
def test_deepcopy_and_pickle_after_training(kind, gate, device):
    layer = make_layer(kind, gate, device, mask_dict={1: 0.5})
    layer.mark_parallel_comm("moe")
    if gate != "naive":
        layer(torch.randn(3, D, device=device))
        assert layer.gate.has_loss  # deepcopy refuses tensors inside a graph
    x = torch.randn(9, D, device=device)
    expected = run(copy.deepcopy(layer), layer.gate, x) if gate == "naive" else None
    for other in copies(layer):
        assert not other.gate.has_loss
        assert_same(run(other, other.gate, x), expected or run(layer, layer.gate, x))
        assert {p.dp_comm for p in other.experts.parameters()} == {"moe"}
        assert {p.dp_comm for p in other.gate.parameters()} == {"gate"}
        assert other.mask_dict == {1: 0.5}
        before = layer.experts.w_up.detach().clone()
        with torch.no_grad():
            other.experts.w_up.zero_()
        assert torch.equal(layer.experts.w_up, before)
        layer(x)


def test_deepcopy_of_expert_modules():
    layer = make_layer("modules", "switch")
    layer(torch.randn(3, D))
    other = copy.deepcopy(layer)
    x = torch.randn(5, D)
    assert_same(run(other, other.gate, x), run(layer, layer.gate, x))


@BOTH
def test_state_dict_round_trip(kind, tmp_path):
    layer, other = make_layer(kind, "naive"), make_layer(kind, "naive")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(5, D)
    assert torch.equal(layer(x), other(x))


def test_a_tag_of_the_user_survives_a_move():
    layer = FMoETransformerMLP(E, D, H)
    layer.experts.w_up.dp_comm = "mine"
    layer.to(torch.float64)
    assert layer.experts.w_up.dp_comm == "mine"
    assert layer.experts.w_down.dp_comm == "none"


@BOTH
def test_data_parallel_without_devices_falls_through(kind):
    layer = make_layer(kind, "naive")
    x = torch.randn(8, D)
    parallel = nn.DataParallel(layer)
    if parallel.device_ids:
        pytest.skip("CUDA devices are there; the CUDA test covers them")
    assert torch.equal(parallel(x), layer(x))


@pytest.mark.cuda
@BOTH
def test_data_parallel(kind, cuda_device):
    layer = make_layer(kind, "naive", cuda_device)
    x = torch.randn(32, D, device=cuda_device)
    expected = run(layer, layer.gate, x)
    parallel = nn.DataParallel(layer)  # every device there is, one included
    actual = run(parallel, layer.gate, x)
    actual = {name.removeprefix("module."): value for name, value in actual.items()}
    assert_same(actual, expected)


def test_it_learns():
    """A mixture fits a function that no single expert of its width fits as well."""
    torch.manual_seed(0)
    x = torch.randn(512, D)
    target = torch.where(x[:, :1] > 0, x.roll(1, 1), -x.roll(2, 1))

    def fit(layer):
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            if (gate_loss := layer.gate.get_loss()) is not None:
                loss = loss + 0.01 * gate_loss
            loss.backward()
            optimizer.step()
        return float((layer(x) - target).detach().square().mean())

    mixture = fit(FMoETransformerMLP(4, D, H, activation="swiglu", top_k=2))
    single = fit(FMoETransformerMLP(1, D, H, activation="swiglu", top_k=1))
    assert mixture < 0.7 * single


def test_parameters_of_a_custom_activation_train():
    layer = FMoETransformerMLP(E, D, H, activation=ScaledTanh())
    layer(torch.randn(5, D)).sum().backward()
    assert float(layer.experts.activation.scale.grad.abs()) > 0


@each("autocast", [None, torch.bfloat16])
@each("router", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mlp", "modules"])
def test_types_of_router_and_experts_may_differ(kind, router, autocast):
    """The value of float64, in the experts' type or autocast's; experts of another type than ``x`` are refused."""
    exact = make_layer(kind, "naive").double()
    x = torch.randn(9, D)
    for experts in (torch.float32, torch.bfloat16):
        layer = copy.deepcopy(exact)
        layer.gate.to(router)
        layer.experts.to(experts)
        tokens = x.to(experts, copy=True).requires_grad_()
        with torch.autocast("cpu", autocast or experts, enabled=autocast is not None):
            y = layer(tokens)
        truth = tokens.detach().double().requires_grad_()
        expected = exact(truth)
        assert y.dtype == (autocast or experts)
        full = {router, y.dtype} <= {torch.float64, torch.float32}
        lowest = torch.float32 if full else torch.bfloat16
        assert_close(y, expected, lowest)
        y.float().sum().backward()
        expected.sum().backward()
        assert_close(tokens.grad, truth.grad, lowest)
        other = torch.bfloat16 if experts == torch.float32 else torch.float32
        if autocast is None:
            match = r"w_up must be torch\.\w+ like x" if kind == "mlp" else "same dtype"
            with pytest.raises((TypeError, RuntimeError), match=match):
                layer(x.to(other))


@pytest.mark.parametrize("kind", LAYERS)
def test_tangents_of_layers(kind):
    """Forward mode against differences, for experts of every kind."""
    layer = make_layer(kind, "naive").double()
    x, v = torch.randn(2, 9, D, dtype=torch.float64)
    tangent = torch.func.jvp(layer, (x,), (v,))[1]
    difference = (layer(x + 1e-6 * v) - layer(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)
    assert tangent.abs().max() > 0.01
