"""What several gates have is called the same in all of them, and means the same."""

from __future__ import annotations

import inspect

import pytest
import torch

import gate_classes
from moeops import FMoETransformerMLP
from moeops.gates import (
    DCGate,
    GShardGate,
    Llama4Gate,
    NaiveGate,
    NoisyGate,
    ReMoEGate,
    SwitchGate,
    TutelGate,
)

D, E, T = 8, 10, 24
FIRST = ("d_model", "num_expert", "world_size", "top_k")
# Other words for top_k, gate_bias, capacity, balance, renormalize and drop_policy.
OTHERS = {
    "k", "topk", "bias", "router_bias", "use_bias", "capacity_factor", "eval_capacity_factor", "drop_tokens",
    "global_balance", "is_gshard_loss", "use_balance", "normalize", "normalize_gate", "norm_topk_prob",
    "batch_prioritized_routing", "policy",
}  # fmt: skip


@pytest.mark.parametrize("cls", gate_classes.CLASSES, ids=lambda cls: cls.__name__)
def test_arguments_are_spelt_alike(cls):
    parameters = inspect.signature(cls).parameters
    assert tuple(parameters)[:4] == FIRST
    assert not OTHERS & parameters.keys()
    gate = gate_classes.make_gate(cls, D, E)
    for name in ("capacity", "balance", "renormalize", "drop_policy", "compat"):
        if name in parameters:
            assert hasattr(gate, name), name


@pytest.mark.parametrize("cls", [SwitchGate, GShardGate, DCGate, NoisyGate, TutelGate])
def test_no_balance_is_no_loss(cls):
    gate, x = cls(D, E, balance=False), torch.randn(T, D)
    torch.manual_seed(1)
    ids, weights = gate(x)
    assert not gate.has_loss
    other = cls(D, E)
    other.load_state_dict(gate.state_dict())
    torch.manual_seed(1)
    want = other(x)
    assert torch.equal(ids, want[0])
    torch.testing.assert_close(weights, want[1])
    assert other.has_loss


def test_llama4_balances_over_all_ranks():
    gate, x = Llama4Gate(D, E, balance=True), torch.randn(T, D)
    gate(x)
    local = gate.get_loss()
    gate.balance = "global"
    gate(x)  # one rank is all there are
    assert torch.equal(gate.get_loss(), local)
    with pytest.raises(ValueError, match=r"Llama4Gate: group must be set for a loss over all"):
        Llama4Gate(D, E, 2, balance="global")(x)
    with pytest.raises(ValueError, match=r"Llama4Gate: balance must be .* got 'all'"):
        Llama4Gate(D, E, balance="all")


def test_a_layer_leaves_the_bias_to_the_gate():
    for cls, default in ((NaiveGate, True), (ReMoEGate, False)):
        for given, wanted in ((None, default), (True, True), (False, False)):
            layer = FMoETransformerMLP(E, D, 12, gate=cls, gate_bias=given)
            assert (layer.gate.gate.bias is not None) == wanted
