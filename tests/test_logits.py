"""The logits of all gates of a model: those that the gate chose from, with gradients, once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gate_classes
import moeops
from moeops import FMoETransformerMLP, keep_logits, take_logits
from moeops.gates import BaseGate, NaiveGate, NoisyGate, SwitchGate, TopKGate, ZeroGate
from tolerances import assert_close

D, E, T = 8, 10, 24
WITHOUT = ("ForcedBalanceGate", "HashGate", "SoftMoEGate", "ZeroGate")


def model_of(*gates):
    return nn.Sequential(
        *(FMoETransformerMLP(E, D, 12, top_k=gate.top_k, gate=gate) for gate in gates)
    )


@pytest.mark.parametrize("cls", gate_classes.CLASSES, ids=lambda cls: cls.__name__)
def test_every_gate_keeps_what_its_losses_read(cls):
    gate = gate_classes.make_gate(cls, D, E)
    if cls.__name__ in WITHOUT:
        assert not gate.has_logits
        return
    seen = []
    gate.add_loss(lambda logits, topk_ids: seen.append(logits) or logits.sum())
    keep_logits(gate)
    gate(torch.randn(T, D))
    ((name, logits),) = take_logits(gate).items()
    assert name == ""
    assert logits is seen[0]
    assert (logits.shape, logits.dtype) == ((T, E), torch.float32)
    assert take_logits(gate) == {}
    gate.keep_logits = False
    gate(torch.randn(T, D))
    assert take_logits(gate) == {}


def test_a_gate_with_a_fused_route_keeps_its_noisy_logits():
    gate, x = NoisyGate(D, E), torch.randn(T, D)
    keep_logits(gate)
    torch.manual_seed(1)
    ids, weights = gate(x)
    logits = take_logits(gate)[""]
    assert torch.equal(ids, logits.topk(2).indices)
    assert_close(weights, logits.topk(2).values.softmax(-1), torch.float32)
    assert not torch.allclose(logits, gate.gate(x))


def loss_of(model, x):
    y = model(x)
    logits = take_logits(model)
    return y.square().sum() + torch.cat(list(logits.values())).logsumexp(-1).square().mean()


def gradients(model, function, x):
    model.zero_grad()
    function(model, x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_loss(model, x):
    """By hand, without noise in the gates."""
    logits, y = [], x
    for layer in model:
        logits.append(layer.gate.gate(y))
        y = layer(y)
    return y.square().sum() + torch.cat(logits).logsumexp(-1).square().mean()


@pytest.mark.parametrize("how", ["eager", "inside", "outside", "checkpoint"])
def test_gradients_reach_routers_and_tokens(how):
    model = model_of(SwitchGate(D, E, switch_eps=0.0), TopKGate(D, E, balance=True))
    x = torch.randn(T, D)
    want = gradients(copy.deepcopy(model), plain_loss, x)
    keep_logits(model)
    torch._dynamo.reset()
    if how == "checkpoint":

        def function(model, x):
            y = checkpoint(model, x, use_reentrant=False)
            logits = torch.cat(list(take_logits(model).values()))
            return y.square().sum() + logits.logsumexp(-1).square().mean()

        actual = gradients(model, function, x)
        assert take_logits(model) == {}  # the recomputation left none
    elif how == "inside":
        function = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        actual = gradients(model, function, x)
    elif how == "outside":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(x)
        assert list(take_logits(compiled)) == ["0.gate", "1.gate"]
        actual = gradients(compiled, loss_of, x)
        actual = {name.removeprefix("_orig_mod."): grad for name, grad in actual.items()}
    else:
        actual = gradients(model, loss_of, x)
    for name, value in want.items():
        assert_close(actual[name], value, torch.float32, name)


def test_copies_and_programs_have_none():
    layer = FMoETransformerMLP(E, D, 12)
    keep_logits(layer)
    x = torch.randn(T, D)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert take_logits(other) == {}
        other(x)
        assert list(take_logits(other)) == ["gate"]
    assert list(take_logits(layer, clear=False)) == ["gate"]
    assert list(take_logits(layer)) == ["gate"]
    torch.export.export(layer, (x,))
    assert take_logits(layer) == {}


def test_a_prototype_hands_its_logits_over():
    numba = pytest.importorskip("moeops.numba")
    from moeops.numba.gates import naive_topk

    gate, x = numba.as_gate(naive_topk)(D, E), torch.randn(T, D)
    keep_logits(gate.add_loss("z"))
    gate(x)
    assert_close(take_logits(gate)[""], gate.gate(x), torch.float32)
    assert_close(gate.get_loss(), moeops.losses.z_loss(gate.gate(x)), torch.float32)


class Own(BaseGate):
    def forward(self, x):
        self.set_loss(None)


def test_what_cannot_be_kept_is_named():
    with pytest.raises(ValueError, match=r"keep_logits: model must hold a gate with logits"):
        keep_logits(ZeroGate(D, E))
    with pytest.raises(TypeError, match=r"take_logits: model must be a torch\.nn\.Module, got 3"):
        take_logits(3)
    gate = Own(E)
    keep_logits(gate)
    with pytest.raises(RuntimeError, match=r"Own: set_loss must get logits where they are kept"):
        gate(torch.randn(T, D))
    keep_logits(NaiveGate(D, E), False)
