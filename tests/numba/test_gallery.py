"""Every op and gate of the gallery and of ``examples/prototypes`` against its reference."""

from __future__ import annotations

import pytest
import torch
from numba_prototypes import require_numba
from torch._dynamo.testing import CompileCounterWithBackend

require_numba()

from gallery_samples import CASES
from prototypes.expert_choice import BlockExpertChoiceGate
from prototypes.group_limited import GroupLimitedGate
from prototypes.switch import SwitchJitterGate

import moeops.numba as prototype
import moeops.numba.gates as gallery
from moeops import FMoETransformerMLP


@pytest.mark.parametrize("name", CASES)
def test_op_against_its_reference(device, name):
    """Values in every type, gradients, and opcheck where a gradient is of another kind; see ``check``."""
    case = CASES[name]
    options = {"opcheck": name in ("naive_topk", "switch_jitter", "unpermute"), **case.options}
    report = prototype.check(case.op, case.reference, case.samples(), devices=[device], **options)
    assert report.lines[0].startswith(f"{device}: {len(case.samples())} samples")


def test_check_says_where_it_ran():
    case = CASES["naive_topk"]
    samples = case.samples()[:1]
    report = prototype.check(case.op, case.reference, samples, dtypes=[torch.float32])
    assert "moeops_numba::naive_topk:\n  cpu: 1 samples in float32, values agree" in str(report)
    assert "  not run: simulator: needs NUMBA_ENABLE_CUDASIM=1" in str(report)
    ran = [line.split(":")[0] for line in (*report.lines, *report.skipped)]
    assert sorted(set(ran)) == ["cpu", "cuda", "simulator"]


GATES = {
    "naive": (gallery.NaiveTopkGate, 2),
    "switch": (SwitchJitterGate, 1),
    "group_limited": (GroupLimitedGate, 2),
    "top_p": (gallery.TopPGate, 3),
    "expert_choice": (BlockExpertChoiceGate, 2),
}


@pytest.mark.parametrize("name", GATES)
def test_gate_in_a_layer(device, name):
    """One compiled graph for all token counts does what eager mode does, to the router's gradient."""
    gate, top_k = GATES[name]
    layer = FMoETransformerMLP(6, 8, 12, activation="swiglu", top_k=top_k, gate=gate).to(device)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (12, 5, 33):
        x = torch.randn(T, 8, device=device)
        results = []
        for module in (layer, compiled):
            torch.manual_seed(3)
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            torch._dynamo.decorators.mark_unbacked(leaf, 0)
            y = module(leaf)
            loss = layer.gate.get_loss()
            (y.square().sum() + (0 if loss is None else loss)).backward()
            results.append((y.detach(), leaf.grad, layer.gate.gate.weight.grad.clone()))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=3e-6)
        assert float(results[0][2].abs().sum()) > 0
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", [name for name in GATES if name != "expert_choice"])
def test_masked_tokens_are_as_good_as_absent(device, name):
    """In the layer's output, the drops and the loss of every gate that ``as_gate`` makes."""
    gate, top_k = GATES[name]
    layer = FMoETransformerMLP(6, 8, 12, activation="swiglu", top_k=top_k, gate=gate).to(device)
    layer.eval()  # the jitter of the switch depends on the number of tokens
    x, mask = torch.randn(20, 8, device=device), torch.arange(20, device=device) % 3
    x[mask != 0] = float("nan")
    y, loss = layer(x, mask), layer.gate.get_loss()
    want, want_loss = layer(x[mask == 0]), layer.gate.get_loss()
    torch.testing.assert_close(y[mask == 0], want)
    assert not y[mask != 0].any()
    if want_loss is not None:
        torch.testing.assert_close(loss, want_loss)


def test_reset_gives_what_setup_adds_its_first_values():
    with torch.device("meta"):
        gate = GroupLimitedGate(8, 4, 1, top_k=2)
    gate.to_empty(device="cpu")
    gate.selection_bias.fill_(float("nan"))
    parameters = dict(gate.named_parameters())
    gate.reset_parameters()
    assert gate.selection_bias.tolist() == [0, 0, 0, 0]
    assert all(parameters[name] is p for name, p in gate.named_parameters())


def test_switch_drops_and_top_p_varies():
    gate = SwitchJitterGate(8, 4, 1, top_k=1)
    torch.nn.init.zeros_(gate.gate.weight)
    gate.gate.bias.data = torch.tensor([9.0, 0.0, 0.0, 0.0])
    ids, weights = gate(torch.randn(20, 8))
    assert (ids >= 0).sum() == 6  # ceil(1.2 * 20 / 4)
    assert weights.min() > 0.9
    assert float(gate.get_loss().detach()) > 3
    ids, weights = gallery.TopPGate(8, 16, 1, top_k=6)(torch.randn(50, 8) * 3)
    taken = (ids >= 0).sum(1)
    assert int(taken.min()) < int(taken.max())
    assert torch.equal(weights[ids < 0], torch.zeros_like(weights[ids < 0]))


def test_hash_is_spread_and_distinct():
    _, ids = gallery.hash_route(torch.arange(6000), num_experts=12, top_k=3)
    loads = ids.flatten().bincount(minlength=12)
    # 18000 draws in 12 bins, at most three per token: six standard deviations are about 6 * sqrt(1500).
    assert int((loads - 1500).abs().max()) < 6 * 1500**0.5
    assert all(len(set(row)) == 3 for row in ids[:200].tolist())
    assert not torch.equal(ids, gallery.hash_route(torch.arange(6000), 12, 3, seed=1)[1])
