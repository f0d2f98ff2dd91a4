"""Llama4Gate against straight-line float64 and against transformers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import check_values, refuses_nan
from gate_checks import D, E, check_checkpoint, check_compile, check_export, gradcheck

from cases import each
from moeops import FMoETransformerMLP, Routing
from moeops.gates import Llama4Gate
from reference_gates import variable as reference
from tolerances import assert_close


@each("balance", [True, False], ids=["balance", "plain"])
@each("k", [1, 3, E])
def test_values_and_gradients(k, balance, dtype, device):
    gate = Llama4Gate(D, E, 1, k, balance=balance)

    def wanted(logits):
        ids, weights, loss = reference.llama4(logits, k)
        return ids, weights, loss if balance else None

    routing = check_values(gate, wanted, dtype, device)
    assert isinstance(routing, Routing)
    assert routing.scale_inputs
    assert routing.num_rows is None


def test_gradcheck():
    gradcheck(Llama4Gate(D, E, 1, 2, balance=True))


def test_no_tokens(device):
    gate = Llama4Gate(D, E, balance=True).to(device)
    assert gate(torch.randn(0, D, device=device)).topk_ids.shape == (0, 1)
    assert float(gate.get_loss().detach()) == 0


@pytest.mark.parametrize("k", [1, 2])
def test_layer_equals_transformers(k):
    models = pytest.importorskip("transformers.models")
    module = models.llama4.modeling_llama4
    config = models.llama4.Llama4TextConfig(
        hidden_size=D, intermediate_size=12, num_local_experts=E, num_experts_per_tok=k
    )
    theirs = module.Llama4TextMoe(config)
    layer = FMoETransformerMLP(E, D, 12, "swiglu", top_k=k, gate=Llama4Gate, bias=False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
        layer.gate.gate.weight.copy_(theirs.router.weight)
        layer.experts.w_up.copy_(theirs.experts.gate_up_proj.transpose(1, 2))
        layer.experts.w_down.copy_(theirs.experts.down_proj.transpose(1, 2))
    x = torch.randn(32, D)
    want = theirs(x)[0] - theirs.shared_expert(x)
    assert_close(layer(x), want, torch.float32)


def test_nan_is_refused():
    refuses_nan(Llama4Gate(D, E))


@pytest.mark.parametrize(("backend", "k"), [("inductor", 1), ("aot_eager", 2)])
def test_compile(backend, k, device):
    check_compile(partial(Llama4Gate, balance=True), device, backend, k)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(Llama4Gate, device, strict, training=True)


def test_checkpoint():
    check_checkpoint(partial(Llama4Gate, balance=True), compile_it=True)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"Llama4Gate: top_k must be at most the 6 experts, got 7"):
        Llama4Gate(D, E, top_k=7)
