"""FasterGate against straight-line float64: few tokens leave their node."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gate_checks import (
    D,
    E,
    assert_gradient,
    check_checkpoint,
    check_compile,
    check_export,
    gradcheck,
    parameters_float64,
)

from cases import each
from host_syncs import no_host_syncs
from moeops.gates import FasterGate, NaiveGate, gen_faster_gate
from reference_gates import fastmoe as fast
from tolerances import assert_close

T = 50


@each("compat", [False, True], ids=["ours", "fastmoe"])
@each("fraction", [0.0, 0.14, 0.6, 1.0])
@each(("node", "k"), [(0, 2), (1, 1), (1, 4), (2, 2)])
def test_values_and_gradients(node, k, fraction, compat, device):
    # 2 experts on each of 5 ranks, nodes of 2: experts 0-3, 4-7, 8-9.
    gate = FasterGate(
        D, 2, 5, k, node_rank=node, gpus_per_node=2, outgoing_fraction=fraction, compat=compat
    ).to(device, torch.float64)
    x = torch.randn(T, D, device=device, dtype=torch.float64, requires_grad=True)
    ids, weights, logits = gate(x, return_all_scores=True)
    loss = gate.get_loss()

    params = parameters_float64(gate)
    x64 = x.detach().cpu().requires_grad_()
    logits64 = x64 @ params["gate.weight"].t() + params["gate.bias"]
    inside = range(4 * node, min(10, 4 * node + 4))
    want_ids, want, want_loss = fast.faster(logits64, k, inside, fraction)
    want_loss = want_loss / 25 if compat else want_loss
    assert torch.equal(ids.cpu(), want_ids)
    assert_close(logits, logits64, torch.float64)
    assert_close(weights, want, torch.float64, "weights")
    assert_close(loss, want_loss, torch.float64, "loss")
    factors = torch.randn(T, k, dtype=torch.float64)
    ((weights * factors.to(weights)).sum() + 3 * loss).backward()
    ((want * factors).sum() + 3 * want_loss).backward()
    assert_gradient(x.grad, x64.grad, torch.float64, "gradient of x")
    weight_grad = params["gate.weight"].grad
    assert_gradient(gate.gate.weight.grad, weight_grad, torch.float64, "gradient of the router")


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_masked_tokens_do_not_leave(fraction, device):
    gate = FasterGate(D, 2, 5, 2, node_rank=1, gpus_per_node=2, outgoing_fraction=fraction)
    gate = gate.to(device, torch.float64)
    x = torch.randn(T, D, device=device, dtype=torch.float64)
    mask = torch.arange(T, device=device) % 2
    there = mask == 0
    ids, weights = gate(x, mask=mask)
    loss = gate.get_loss()
    want_ids, want = gate(x[there])
    assert torch.equal(ids[there], want_ids)
    assert_close(weights[there], want, torch.float64)
    assert_close(loss, gate.get_loss(), torch.float64)
    assert bool((ids[~there] == -1).all())


def test_quota_is_met_and_the_best_leave(device):
    gate = FasterGate(
        D, 4, 2, node_rank=0, gpus_per_node=1, outgoing_fraction=0.1, gate_bias=False
    ).to(device)
    x = torch.randn(T, D, device=device)
    ids, _, logits = gate(x, return_all_scores=True)
    outside = ids >= 4
    assert int(outside.sum()) == 5
    assert bool((outside.sum(1) <= 1).all())
    wanted = fast.best(logits.cpu(), 1)[:, 0] >= 4
    assert int(wanted.sum()) > 5
    best_logits = logits.amax(1)
    leaving = outside.any(1)
    assert float(best_logits[leaving].min()) >= float(
        best_logits[wanted.to(device) & ~leaving].max()
    )


def test_below_the_quota_and_on_one_node_nothing_is_limited(device):
    naive = NaiveGate(D, E, 1, 2).to(device)
    x = torch.randn(T, D, device=device)
    for options in (
        {"node_rank": 0, "gpus_per_node": 1, "outgoing_fraction": 1.0},
        {"gpus_per_node": 8, "outgoing_fraction": 0.0},
    ):
        gate = FasterGate(D, E // 3, 3, **options).to(device)
        gate.load_state_dict(naive.state_dict())
        ids, weights = gate(x)
        assert torch.equal(ids, naive(x)[0])
        assert_close(weights, naive(x)[1], torch.float32)


def test_factory():
    build = gen_faster_gate(5, gpus_per_node=2, outgoing_fraction=0.3, compat=True)
    gate = build(D, 2, 8, 2)
    assert isinstance(gate, FasterGate)
    assert (gate.node_rank, gate.first_expert, gate.last_expert) == (2, 8, 12)
    assert (gate.outgoing_fraction, gate.compat) == (0.3, True)
    assert build(D, 2, 8, gate_bias=False).gate.bias is None


def test_gradcheck():
    gradcheck(FasterGate(D, 2, 3, node_rank=1, gpus_per_node=1, outgoing_fraction=0.3), T=7)


def three_nodes(d_model, num_expert, world_size, top_k, gate_bias=True, fraction=0.3):
    """The layer's experts seen as three nodes: the choice knows nothing of where they are."""
    return FasterGate(
        d_model, 2, 3, top_k, node_rank=1, gpus_per_node=1, outgoing_fraction=fraction
    )


def test_compile(device):
    check_compile(three_nodes, device, "inductor" if device == "cuda" else "aot_eager")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(partial(three_nodes, fraction=0.6), device, strict, training=True)


def test_checkpoint():
    check_checkpoint(three_nodes, compile_it=False)


def test_no_tokens(device):
    gate = FasterGate(D, 2, 2, node_rank=0, gpus_per_node=1).to(device)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    assert float(gate.get_loss().detach()) == 0


@pytest.mark.cuda
def test_no_host_sync(cuda_device):
    gate = FasterGate(D, 2, 2, node_rank=0, gpus_per_node=1).to(cuda_device)
    x = torch.randn(32, D, device=cuda_device)
    gate(x)
    with no_host_syncs():
        gate(x)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, r"node_rank must be given with 2 nodes, got None"),
        ({"node_rank": 2}, ValueError, r"node_rank must be below the 2 nodes, got 2"),
        ({"node_rank": -1}, ValueError, r"node_rank must be at least 0, got -1"),
        ({"node_rank": 0, "gpus_per_node": 0}, ValueError, r"gpus_per_node must be at least 1"),
        (
            {"node_rank": 0, "outgoing_fraction": 1.1},
            ValueError,
            r"outgoing_fraction must be in \[0, 1\], got 1\.1",
        ),
        (
            {"node_rank": 0, "top_k": 3},
            ValueError,
            r"top_k must be at most the 2 experts of the node, got 3",
        ),
        ({"node_rank": 0.5}, TypeError, r"node_rank must be an int, got 0\.5"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=f"FasterGate: {match}"):
        FasterGate(D, 1, 4, **{"gpus_per_node": 2, **options})


def test_options_from_the_environment(monkeypatch):
    default = FasterGate.from_environment(11)(D, 1, 16)
    assert (default.node_rank, default.gpus_per_node, default.outgoing_fraction) == (1, 8, 0.14)
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "2")
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", "0.5")
    gate = FasterGate.from_environment(5, compat=True)(D, 2, 6)
    assert (gate.node_rank, gate.gpus_per_node, gate.outgoing_fraction) == (2, 2, 0.5)
    assert gate.compat
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "many")
    with pytest.raises(ValueError, match=r"FMOE_TOPO_GPUS_PER_NODE must be .* int, got 'many'"):
        FasterGate.from_environment(5)
