"""The grids of FastMoE's own tests on one rank: its sizes and tolerances. Several ranks: fmoe_grid_checks.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from fmoe_cases import imported
from fmoe_grids import (
    DTYPES,
    KINDS,
    NUM_EXPERTS,
    D,
    OneLayer,
    Reference,
    T,
    TwoLayers,
    compare,
    make_fused,
    near,
)
from torch import nn

from cases import each


@pytest.fixture
def fmoe():
    """``import fmoe`` with FastMoE's numbers, undone afterwards."""
    with imported(compat=True) as package:
        yield package


TOP_KS = (2, 3)


@each("num_expert, top_k, dtype", list(itertools.product(NUM_EXPERTS, TOP_KS, DTYPES)))
def test_fused_experts(num_expert, top_k, dtype, fmoe):
    layer = make_fused(num_expert, top_k).to(dtype)
    compare(layer, Reference(layer), torch.rand(T, D).to(dtype))


@each(
    "num_expert, top_k, kind, dtype",
    list(itertools.product(NUM_EXPERTS, TOP_KS, KINDS, DTYPES)),
)
def test_experts_of_one_class(num_expert, top_k, kind, dtype, fmoe):
    layer = fmoe.FMoE(num_expert=num_expert, d_model=D, expert=KINDS[kind], top_k=top_k).to(dtype)
    compare(layer, Reference(layer), torch.rand(T, D).to(dtype))


@each(
    "top_k, experts", list(itertools.product(TOP_KS, ([TwoLayers] * 4, [OneLayer, TwoLayers] * 4)))
)
def test_experts_of_a_list(top_k, experts, fmoe):
    layer = fmoe.FMoE(num_expert=None, d_model=D, expert=experts, top_k=top_k)
    assert layer.num_expert == len(experts)
    compare(layer, Reference(layer), torch.rand(T, D))


@each("num_expert, top_k", list(itertools.product(NUM_EXPERTS, TOP_KS)))
def test_data_parallel(num_expert, top_k, fmoe):
    layer = make_fused(num_expert, top_k)
    parallel = nn.DataParallel(layer)
    for _ in range(5):
        x = torch.rand(T, D)
        assert torch.equal(parallel(x), layer(x))


@each("num_expert, top_k", list(itertools.product((1, 4, 8), (1, 2))))
def test_scatter(num_expert, top_k, fmoe):
    from fmoe.functions import MOEScatter, count_by_gate

    ids = torch.randint(num_expert + 1, (12, top_k)) - 1
    pos, local, received = count_by_gate(ids, num_expert, 1)
    x = torch.rand(12, 6, requires_grad=True)
    out = MOEScatter.apply(x, pos % 12, local, received, int(received.sum()), 1)
    assert torch.equal(out, x[pos % 12])
    out.sum().backward()
    assert torch.equal(x.grad, (pos % 12).bincount(minlength=12)[:, None].expand(12, 6).float())


@each(
    "num_expert, top_k, dtype, as_list",
    list(itertools.product(NUM_EXPERTS, TOP_KS, (*DTYPES, torch.float64), (False, True))),
)
def test_several_inputs(num_expert, top_k, dtype, as_list, fmoe):
    from fmoe.gates import NaiveGate
    from fmoe.transformer import _Expert

    first = 0 if as_list else "x"
    second = 1 if as_list else "y"

    class Gate(NaiveGate):
        def forward(self, inp, return_all_scores=False):
            return super().forward(inp[first], return_all_scores)

    class Both(_Expert):
        def forward(self, inp, count):
            parts = [super(Both, self).forward(inp[key], count) for key in (first, second)]
            return parts if as_list else {"x": parts[0], "y": parts[1]}

    layer = fmoe.FMoE(num_expert=num_expert, d_model=D, top_k=top_k, gate=Gate)
    layer.experts = Both(num_expert, D, 4 * D, F.gelu)
    layer = layer.to(dtype)
    x = torch.rand(T, D).to(dtype)
    out = layer([x, x.clone()] if as_list else {"x": x, "y": x.clone()})
    assert torch.equal(out[first], out[second])
    alone = make_fused(num_expert, top_k)
    alone.experts = _Expert(num_expert, D, 4 * D, F.gelu)
    alone = alone.to(dtype)
    alone.load_state_dict(layer.state_dict())
    assert torch.equal(out[first], alone(x))


@each("capacity", [0.1, 1.1])
def test_gshard_gate(capacity, fmoe):
    from fmoe.gates import GShardGate

    gate = GShardGate(1024, 4, 1, capacity=(capacity, capacity))
    x = torch.rand(16, 1024)
    ids, scores = gate(x)
    kept = ids >= 0
    assert int(ids[kept].bincount(minlength=4).max()) <= math.ceil(capacity * 16)
    logits = gate.gate(x)
    expected = logits.topk(2).values.softmax(-1)
    assert torch.equal(scores[kept], expected[kept])
    assert bool((ids == logits.topk(2).indices)[kept].all())


@each("num_expert, capacity", list(itertools.product((1, 16), (0.1, 0.8))))
def test_switch_gate(num_expert, capacity, fmoe):
    """Bit for bit: the noise of training is drawn as FastMoE draws it."""
    from fmoe.gates import SwitchGate

    gate = SwitchGate(1024, num_expert, 1, capacity=(capacity, capacity))
    x = torch.rand(4096, 1024)
    state = torch.get_rng_state()
    ids, scores = gate(x)
    kept = ids >= 0
    assert int(ids[kept].bincount(minlength=num_expert).max()) <= math.ceil(capacity * 4096)
    logits = gate.gate(x)
    torch.set_rng_state(state)
    noise = torch.rand_like(logits) * 2 * 0.1 + 1.0 - 0.1
    expected = (logits + noise).softmax(-1)
    assert torch.equal(scores[kept], expected.gather(1, ids.clamp_min(0))[kept])
    assert bool(kept.any())


@each("num_expert, top_k", [(2, 1), (2, 2)])
def test_constant_gates(num_expert, top_k, fmoe):
    """Flat ids and scores ``[T, 1, K]``, as FastMoE's first gates have them."""

    class Constant(nn.Module):
        def __init__(self, d_model, num_expert, world_size, top_k=1):
            super().__init__()
            self.top_k = top_k

        def forward(self, inp):
            ids = torch.zeros(inp.shape[0] * self.top_k, dtype=torch.int64)
            return ids, torch.full((inp.shape[0], 1, self.top_k), 0.5)

    x = torch.rand(4, 8)
    out = fmoe.layers._fmoe_general_global_forward(
        x, torch.zeros(4, dtype=torch.int64), lambda rows, counts: rows, num_expert, 1
    )
    assert torch.equal(out, x)
    layer = fmoe.FMoETransformerMLP(num_expert, 8, 32, 1, gate=Constant, top_k=top_k)
    whole = layer.expert_fn(x, torch.tensor([4, 0]))
    near(layer(x), 0.5 * top_k * whole, torch.float32)
