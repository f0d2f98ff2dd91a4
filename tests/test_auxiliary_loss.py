"""The losses of a model: their sum, losses as options of a gate, accumulation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import gate_classes
from moeops import FMoETransformerMLP, auxiliary_loss
from moeops.gates import BaseGate, GShardGate, NaiveGate, SwitchGate, with_losses
from moeops.losses import (
    router_entropy,
    switch_loss,
    z_loss,
)
from tolerances import assert_close

T, E, K = 9, 5, 3
D = 8


def model_of(*gates, device="cpu"):
    layers = [FMoETransformerMLP(4, D, 12, top_k=gate.top_k, gate=gate) for gate in gates]
    return nn.Sequential(*layers).to(device)


def quiet_gates():
    """One of each kind, without noise."""
    return (
        SwitchGate(D, 4, switch_eps=0.0),
        NaiveGate(D, 4),
        GShardGate(D, 4, random_routing=False),
    )


def test_sums_every_pending_loss_once(device):
    switch, naive, gshard = quiet_gates()
    model = model_of(switch, naive, gshard, device=device)
    model(torch.randn(6, D, device=device))
    want = switch.get_loss(clear=False) + gshard.get_loss(clear=False)
    assert torch.equal(auxiliary_loss(model, clear=False), want)
    total = auxiliary_loss(model)
    assert torch.equal(total, want)
    assert not switch.has_loss
    assert not gshard.has_loss
    assert float(auxiliary_loss(model)) == 0
    total.backward()
    for gate in (switch, gshard):
        assert float(gate.gate.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("clear", [True, False])
def test_a_shared_gate_counts_once(clear):
    gate = SwitchGate(D, 4, switch_eps=0.0)
    model = model_of(gate, gate)
    model(torch.randn(6, D))
    want = gate.get_loss(clear=False)
    assert torch.equal(auxiliary_loss(model, clear), want)
    assert gate.has_loss is not clear


def test_added_losses(device):
    """They come on top of the gate's own, for a gate with a loss and for one without."""
    x = torch.randn(12, D, device=device)
    plain = SwitchGate(D, 4, switch_eps=0.0, capacity=None).to(device)
    gate = copy.deepcopy(plain).add_loss("z", 0.25).add_loss("entropy", -0.5)
    plain(x), gate(x)
    logits = x @ plain.gate.weight.T + plain.gate.bias
    want = plain.get_loss() + 0.25 * z_loss(logits) - 0.5 * router_entropy(logits)
    assert_close(gate.get_loss(), want, torch.float32)
    naive = NaiveGate(D, 4, 1, 2).to(device).add_loss("switch", 2.0)
    naive.add_loss(lambda logits, topk_ids: logits.square().mean() + topk_ids.shape[1])
    ids, _, logits = naive(x, return_all_scores=True)
    want = 2 * switch_loss(logits, ids) + logits.square().mean() + 2
    assert_close(naive.get_loss(), want, torch.float32)
    want.backward()
    assert not NaiveGate(D, 4).extra_losses


def test_added_losses_compile_and_accumulate():
    torch._dynamo.reset()
    counters.clear()
    gates = (with_losses(NaiveGate, z=0.1), with_losses(SwitchGate, entropy=-0.1))
    model = model_of(gates[0](D, 4, top_k=2), gates[1](D, 4, switch_eps=0.0))
    batches = torch.randn(3, 16, D).unbind()
    want = train(copy.deepcopy(model), micro_loss, batches)
    actual = train(model, torch.compile(micro_loss, fullgraph=True, backend="aot_eager"), batches)
    assert counters["stats"]["unique_graphs"] == 1
    for name, value in want.items():
        assert_close(actual[name], value, torch.float32, name)
    assert float(want["0.gate.gate.weight"].abs().sum()) > 0


@pytest.mark.parametrize("cls", gate_classes.CLASSES, ids=lambda cls: cls.__name__)
def test_every_gate_takes_added_losses_or_says_no(cls):
    """The same noise with and without: the difference is the added loss of the gate's own logits."""
    gate = gate_classes.make_gate(cls, D, 8)
    if not gate.has_logits:
        assert cls.__name__ in ("ForcedBalanceGate", "HashGate", "SoftMoEGate", "ZeroGate")
        with pytest.raises(
            TypeError, match=rf"{cls.__name__}\.add_loss: the gate must have logits"
        ):
            gate.add_loss("z")
        return
    seen = []

    def spy(logits, topk_ids):
        seen.append((logits.shape, topk_ids.shape[0], int(topk_ids.min()), int(topk_ids.max())))
        return z_loss(logits)

    other = copy.deepcopy(gate).add_loss(spy, 0.5).add_loss("switch").add_loss("switch", -1)
    x = torch.randn(32, D)
    torch.manual_seed(1)
    gate(x)
    torch.manual_seed(1)
    other(x)
    ((shape, tokens, low, high),) = seen
    assert (shape, tokens) == ((32, 8), 32)
    assert -1 <= low <= high < 8
    own, total = gate.get_loss(), other.get_loss()
    added = total if own is None else total - own
    assert float(added.detach()) > 0
    added.backward()
    assert any(p.grad is not None and p.grad.any() for p in other.parameters())


def test_with_losses_builds_what_the_layer_asks_for():
    layer = FMoETransformerMLP(4, D, 12, gate=with_losses(NaiveGate, z=1e-3), gate_bias=False)
    assert layer.gate.gate.bias is None
    assert [weight for _, weight in layer.gate.extra_losses] == [1e-3]
    with pytest.raises(ValueError, match=r"NaiveGate\.add_loss: loss must be one of .* got 'y'"):
        with_losses(NaiveGate, y=1.0)(D, 4)


def test_a_gate_that_hands_over_no_logits_is_named():
    class Own(BaseGate):
        def forward(self, x):
            self.set_loss(x.sum())

    with pytest.raises(RuntimeError, match=r"Own: set_loss must get logits and topk_ids"):
        Own(2).add_loss("z")(torch.randn(3, D))


def test_zero_without_a_loss(device):
    for module in (nn.Linear(2, 2, device=device), model_of(NaiveGate(D, 4), device=device)):
        total = auxiliary_loss(module)
        assert total.shape == ()
        assert total.device.type == device
        assert float(total) == 0
    assert auxiliary_loss(nn.ReLU()).device.type == "cpu"


def test_keeps_float64_and_widens_bfloat16():
    class Constant(BaseGate):
        pass

    gate = Constant(2)
    gate.set_loss(torch.tensor(1 + 2**-40, dtype=torch.float64))
    assert float(auxiliary_loss(gate)) == 1 + 2**-40
    gate.set_loss(torch.tensor(1.5, dtype=torch.bfloat16))
    assert auxiliary_loss(gate).dtype == torch.float32


def train(model, loss_of, micro_batches):
    """Gradient accumulation over micro-batches; the gradients by name."""
    model.zero_grad()
    for x in micro_batches:
        loss_of(model, x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def micro_loss(model, x):
    return (model(x).square().mean() + 0.1 * auxiliary_loss(model)) / 3


def test_gradient_accumulation():
    model = model_of(*quiet_gates())
    batches = torch.randn(3, 16, D).unbind()
    actual = train(model, micro_loss, batches)

    other = copy.deepcopy(model)
    total = 0
    for x in batches:  # one graph for the whole step, the losses fetched by hand
        y = other(x)
        gates = [layer.gate for layer in other]
        total = total + y.square().mean() / 3
        total = total + sum(0.1 * g.get_loss() / 3 for g in gates if g.has_loss)
    total.backward()
    for name, parameter in other.named_parameters():
        assert_close(actual[name], parameter.grad, torch.float32, name)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_compile_and_accumulation(inside):
    torch._dynamo.reset()
    counters.clear()
    model = model_of(*quiet_gates())
    batches = torch.randn(3, 16, D).unbind()
    want = train(copy.deepcopy(model), micro_loss, batches)
    if inside:
        compiled = torch.compile(micro_loss, fullgraph=True, backend="aot_eager")
        actual = train(model, compiled, batches)
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = train(compiled, micro_loss, batches)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not any(layer.gate.has_loss for layer in model)
    for name, value in want.items():
        result = actual[name if inside else f"_orig_mod.{name}"]
        assert_close(result, value, torch.float32, name)
