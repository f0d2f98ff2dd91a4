"""torch's FLOP counter against the products counted by hand, forward and backward."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moeops
from moeops import FMoE, FMoETransformerMLP

T, D, H, E, K = 6, 8, 16, 4, 2
ROUTER = 2 * T * D * E


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def by_op(function) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return {str(op): count for op, count in counts.items() if str(op).startswith("moeops.")}


@pytest.mark.parametrize(("activation", "up"), [("swiglu", 2 * H), ("relu", H)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_costs_its_products(activation, up, bias):
    layer = FMoETransformerMLP(E, D, H, activation=activation, top_k=K, bias=bias)
    forward = 2 * T * K * D * up + 2 * T * K * H * D
    x = torch.randn(T, D)
    assert flops(lambda: layer(x)) == ROUTER + forward
    y = layer(x)  # no gradient of x: one product of the router and one with w_up less
    assert flops(lambda: y.sum().backward()) == ROUTER + forward + 2 * T * K * H * D
    y = layer(x.requires_grad_())
    assert flops(lambda: y.sum().backward()) == 2 * ROUTER + 2 * forward


def test_every_choice_of_gradients_costs_the_products_it_needs():
    up, down = 2 * 12 * 8 * 16, 2 * 12 * 5 * 16
    for needs in itertools.product([False, True], repeat=4):
        x, w = torch.randn(T, D), torch.rand(T, K)
        block = [x, w, torch.randn(E, 16, D), torch.randn(E, 5, 16)]
        for tensor, need in zip(block, needs, strict=True):
            tensor.requires_grad_(need)
        plan = moeops.sort_tokens(torch.randint(E, (T, K)), E)
        y = moeops.moe_mlp(x, plan, w, *block[2:], activation="gelu")
        if not any(needs):
            continue
        need_x, need_weights, need_up, need_down = needs
        want = up * (need_x + need_up) + down * ((need_x or need_weights or need_up) + need_down)
        assert flops(lambda y=y: y.sum().backward()) == want, needs


def test_products_between_rows_and_their_gradients():
    rows = torch.randn(12, D, requires_grad=True)
    weight = torch.randn(E, 5, D, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 7, 12], dtype=torch.int32)
    product = 2 * 12 * D * 5

    def run():
        y = moeops.grouped_linear(rows, weight, offsets, bias=torch.randn(E, 5))
        y.sum().backward()

    assert by_op(run) == {
        "moeops.grouped_linear": 2 * product,
        "moeops.grouped_linear_weight_grad": product,
    }


def test_rows_that_a_plan_has_are_counted_whether_a_pair_owns_them_or_not():
    x, w_up, w_down = torch.randn(T, D), torch.randn(E, 2 * H, D), torch.randn(E, D, H)
    ids = torch.full((T, K), -1)
    ids[0, 0] = 1
    row = 2 * D * 2 * H + 2 * H * D
    for num_rows, counted in ((None, T * K), (5, 5)):
        plan = moeops.sort_tokens(ids, E, num_rows)
        weights = torch.rand(T, K)
        got = flops(lambda plan=plan, w=weights: moeops.moe_mlp(x, plan, w, w_up, w_down))
        assert got == counted * row


def test_all_ways_to_run_the_same_experts_count_the_same():
    x = torch.randn(T, D)
    fused = FMoETransformerMLP(E, D, H, activation=nn.Tanh(), top_k=K)
    modules = FMoE(
        E, D, top_k=K, expert=lambda d: nn.Sequential(nn.Linear(d, H), nn.Tanh(), nn.Linear(H, d))
    )
    want = ROUTER + 2 * (2 * T * K * D * H)
    assert flops(lambda: fused(x)) == flops(lambda: modules(x)) == want


def test_formulas_come_with_the_counter_whichever_is_imported_first():
    code = """
import sys, moeops
assert "torch.utils.flop_counter" not in sys.modules, "importing the counter may import Triton"
import torch.utils.flop_counter as counter
for name in ("moe_mlp", "moe_mlp_backward_data", "moe_mlp_backward_weights", "grouped_linear"):
    assert getattr(counter.torch.ops.moeops, name) in counter.flop_registry
assert not any(getattr(finder, "name", None) == counter.__name__ for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
