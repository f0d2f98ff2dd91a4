"""The Hopper kernels: awkward sizes, values that must not travel between experts, repeatability, and the rules.

Every check runs with ``MOEOPS_KERNELS=hopper``, so that a problem which the kernels refuse fails instead of
passing in the general ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import moeops
from moeops import TokenPlan, reference
from tolerances import TOLERANCES

pytestmark = pytest.mark.cuda

HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ACTIVATIONS = ("swiglu", "gelu", "relu", "silu", "relu_squared")
EDGES = (0, 1, 63, 64, 65, 127, 128, 129, 200)  # rows per expert around blocks and tiles


@pytest.fixture(autouse=True)
def hopper_only(monkeypatch, cuda_device):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels need compute capability 9.0")
    monkeypatch.setenv("MOEOPS_KERNELS", "hopper")


def plan_of(counts, top_k: int = 1, spare: int = 0) -> TokenPlan:
    """A plan with ``counts[e]`` rows of expert e in random token order, and ``spare`` rows without a pair.

    Pairs that do not fill a whole token are dropped ones.
    """
    num_pairs = math.ceil(sum(counts) / top_k) * top_k
    ids = torch.full((num_pairs,), -1)
    filled = torch.cat([torch.full((c,), e) for e, c in enumerate(counts)])
    ids[torch.randperm(num_pairs)[: len(filled)]] = filled
    return moeops.sort_tokens(ids.view(-1, top_k).cuda(), len(counts), num_pairs + spare)


@dataclass
class Problem:
    """Inputs of a block that are near one, so that sums of rounded products stay in range."""

    plan: TokenPlan
    activation: str
    tensors: dict[str, Tensor]

    @classmethod
    def draw(cls, plan, D, H, dtype, activation="swiglu", bias=False, transposed=False):
        T, K = plan.pair_to_row.shape
        E = plan.expert_offsets.shape[0] - 1
        up = 2 * H if activation == "swiglu" else H

        def weight(rows, columns):
            w = torch.randn(E, rows, columns, device="cuda") / columns**0.5
            w = w.to(dtype)
            return w.mT.contiguous().mT if transposed else w

        tensors = {
            "x": torch.randn(T, D, device="cuda").to(dtype),
            "topk_weights": torch.rand(T, K, device="cuda"),
            "w_up": weight(up, D),
            "w_down": weight(D, H),
        }
        if bias:
            tensors["b_up"] = torch.randn(E, up, device="cuda").to(dtype) / 4
            tensors["b_down"] = torch.randn(E, D, device="cuda").to(dtype) / 4
        return cls(plan, activation, tensors)

    def run(self, function, tensors, grad):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        x, weights = leaves["x"], leaves["topk_weights"]
        rest = {n: t for n, t in leaves.items() if n not in ("x", "topk_weights")}
        y = function(x, self.plan, weights, activation=self.activation, **rest)
        grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def check(self, dtype):
        grad = torch.randn_like(self.tensors["x"])
        got = self.run(moeops.moe_mlp, self.tensors, grad)
        exact = {n: t.double() for n, t in self.tensors.items()}
        want = self.run(reference.moe_mlp, exact, grad.double())
        for name, expected in want.items():
            assert_near(got[name], expected, dtype, name)
        return got


def assert_near(got: Tensor, want: Tensor, dtype, name: str) -> None:
    """Within the dtype's tolerance of the largest value, and much closer in the mean."""
    assert got.shape == want.shape, name
    got, tolerance = got.double(), TOLERANCES[dtype]
    assert torch.isfinite(got).all(), f"{name} is not finite"
    scale = want.abs().max().clamp_min(1e-2)
    worst = (got - want).abs().max() / scale
    assert worst <= 2 * tolerance, f"{name}: off by {worst:.2e} of {scale:.2e}"
    if want.norm() > 0:
        error = (got - want).norm() / want.norm()
        assert error <= tolerance / 2, f"{name}: relative error {error:.2e}"


@HALF
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_biases_and_major_orders(half, bias, transposed, activation):
    plan = plan_of(EDGES, top_k=3, spare=40)
    Problem.draw(plan, 200, 136, half, activation, bias, transposed).check(half)


@HALF
@pytest.mark.parametrize(("D", "H"), [(8, 8), (8, 72), (72, 8), (96, 96), (2880, 96), (96, 2880)])
def test_widths(half, D, H):
    Problem.draw(plan_of(EDGES), D, H, half).check(half)


@pytest.mark.parametrize("E", [1, 3, 129, 1000])
def test_numbers_of_experts(E):
    counts = torch.randint(0, 70, (E,)).tolist()
    Problem.draw(plan_of(counts, top_k=2), 96, 72, torch.bfloat16).check(torch.bfloat16)


def test_more_experts_than_threads_of_the_plan():
    counts = torch.randint(0, 4, (2500,)).tolist()
    Problem.draw(plan_of(counts), 16, 8, torch.bfloat16).check(torch.bfloat16)


@pytest.mark.parametrize("E", [1, 64])
def test_all_rows_to_one_expert(E):
    counts = [0] * E
    counts[E // 2] = 5000
    Problem.draw(plan_of(counts, top_k=4), 264, 72, torch.bfloat16).check(torch.bfloat16)


@pytest.mark.parametrize("tiles", [0, 1, 2, 131, 132, 133, 265])
def test_numbers_of_tiles(tiles):
    """Fewer tiles than multiprocessors, as many, one more: some consumers never get one."""
    counts = [1] * tiles + [0] * max(1, 3 - tiles)
    plan = plan_of(counts, spare=5)
    if tiles == 0:
        plan = moeops.sort_tokens(torch.full((4, 1), -1, device="cuda"), 3)
    Problem.draw(plan, 64, 64, torch.bfloat16).check(torch.bfloat16)


TILES = [
    "up=p192:small:skip,down=p192:large:whole,dh=p192:small:whole,dx=p192:large:skip,dw_up=p192:1,dw_down=c256:3",
    "up=p192x2:small:whole,down=p192x2:large:skip,dh=p192x2:small:skip,dx=p192x2:small:whole,"
    "dw_up=p192x2:16,dw_down=p192x2:16",
    "up=c256:large:skip,down=c256:small:skip,dh=p128x2:large:whole,dx=c256:large:whole,dw_up=c256:4,dw_down=p192:9",
    "up=c256x2:large:whole,down=c256x2:small:whole,dh=p128x2:small:skip,dx=c256x2:large:skip,dw_up=p192:2,dw_down=p192:2",
]


@HALF
@pytest.mark.parametrize("tiles", TILES, ids=range(len(TILES)))
@pytest.mark.parametrize(("D", "H"), [(200, 136), (520, 392)])
def test_every_tile(half, tiles, D, H, monkeypatch):
    monkeypatch.setenv("MOEOPS_TILES", tiles)
    counts = [*EDGES, 1000, 3, 900]
    Problem.draw(plan_of(counts, top_k=2, spare=99), D, H, half).check(half)


def test_repeats_bitwise():
    problem = Problem.draw(plan_of([300, 0, 77, 1025, 64], top_k=3), 392, 264, torch.bfloat16)
    grad = torch.randn_like(problem.tensors["x"])
    first = problem.run(moeops.moe_mlp, problem.tensors, grad)
    for _ in range(20):
        for name, value in problem.run(moeops.moe_mlp, problem.tensors, grad).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_experts_values_stay_with_it(poison):
    """NaN in one expert's tokens and weights reaches neither the rows nor the gradients of the others."""
    counts = [70, 65, 1, 130, 64]
    plan = plan_of(counts)
    problem = Problem.draw(plan, 200, 136, torch.bfloat16)
    E, sick = len(counts), 1
    owner = torch.repeat_interleave(torch.arange(E), torch.tensor(counts))
    token_owner = torch.empty_like(owner)
    token_owner[plan.row_to_pair.cpu().long()] = owner
    problem.tensors["x"][token_owner == sick] = poison
    problem.tensors["w_down"][sick] = poison
    problem.tensors["w_up"][sick] = poison
    got = problem.run(moeops.moe_mlp, problem.tensors, torch.randn_like(problem.tensors["x"]))
    well_tokens, well = token_owner != sick, [e for e in range(E) if e != sick]
    for name in ("y", "x", "topk_weights"):
        assert got[name][well_tokens.cuda()].isfinite().all(), name
    for name in ("w_up", "w_down"):
        assert got[name][well].isfinite().all(), name
        assert not got[name][sick].isfinite().all(), name


def test_rows_without_a_pair_stay_out():
    """Tokens that nobody chose may be anything, and what lies in memory before a call as well."""
    counts = [70, 65, 0, 130]
    plan = plan_of(counts, top_k=4, spare=300)
    problem = Problem.draw(plan, 200, 136, torch.bfloat16)
    dropped = (plan.pair_to_row >= plan.expert_offsets[-1]).all(1)
    problem.tensors["x"][dropped] = float("nan")
    problem.tensors["topk_weights"][plan.pair_to_row >= plan.expert_offsets[-1]] = float("nan")
    torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
    try:
        got = problem.run(moeops.moe_mlp, problem.tensors, torch.randn_like(problem.tensors["x"]))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in got.items():
        assert value.isfinite().all(), name
    assert (got["topk_weights"][plan.pair_to_row >= plan.expert_offsets[-1]] == 0).all()


@HALF
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_grouped_linear(half, transposed, bias):
    plan = plan_of(EDGES, spare=70)
    E, D, H = len(EDGES), 200, 136
    weight = (torch.randn(E, H, D, device="cuda") / D**0.5).to(half)
    if transposed:
        weight = weight.mT.contiguous().mT
    rows = torch.randn(plan.row_to_pair.shape[0], D, device="cuda").to(half)
    tensors = {"rows": rows, "weight": weight}
    if bias:
        tensors["bias"] = torch.randn(E, H, device="cuda").to(half)
    grad = torch.randn(rows.shape[0], H, device="cuda").to(half)
    grad[plan.expert_offsets[-1] :] = float("nan")
    rows[plan.expert_offsets[-1] :] = float("nan")

    def run(function, tensors, grad):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        out = function(
            leaves["rows"], leaves["weight"], plan.expert_offsets, bias=leaves.get("bias")
        )
        return out.detach(), torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))

    live = plan.expert_offsets[-1]
    exact = {n: t.double() for n, t in tensors.items()}
    exact["rows"] = exact["rows"].nan_to_num()
    out, grads = run(moeops.grouped_linear, tensors, grad)
    want, want_grads = run(reference.grouped_linear, exact, grad.double().nan_to_num())
    assert_near(out, want, half, "out")
    assert (out[live:] == 0).all()
    for name, got, expected in zip(tensors, grads, want_grads, strict=True):
        assert_near(got, expected, half, name)


def test_inference_writes_no_pre_activation():
    problem = Problem.draw(plan_of([200, 56]), 128, 64, torch.bfloat16)
    with torch.no_grad():
        got = moeops.moe_mlp(plan=problem.plan, activation="swiglu", **problem.tensors)
    leaves = {n: t.detach().requires_grad_() for n, t in problem.tensors.items()}
    assert torch.equal(got, moeops.moe_mlp(plan=problem.plan, activation="swiglu", **leaves))


def test_equals_the_general_kernels(monkeypatch):
    problem = Problem.draw(plan_of([300, 0, 77, 200], top_k=3), 200, 136, torch.bfloat16, bias=True)
    grad = torch.randn_like(problem.tensors["x"])
    got = problem.run(moeops.moe_mlp, problem.tensors, grad)
    monkeypatch.setenv("MOEOPS_KERNELS", "general")
    for name, want in problem.run(moeops.moe_mlp, problem.tensors, grad).items():
        assert_near(got[name], want.double(), torch.bfloat16, name)


def test_refusals_name_their_reason(monkeypatch):
    plan = plan_of([200, 56])

    def refused(reason, problem):
        with pytest.raises(RuntimeError, match=f"MOEOPS_KERNELS=hopper, but {reason}"):
            moeops.moe_mlp(plan=plan, activation=problem.activation, **problem.tensors)
        monkeypatch.setenv("MOEOPS_KERNELS", "auto")
        grad = torch.randn_like(problem.tensors["x"])
        dtype = problem.tensors["x"].dtype
        exact = {n: t.double() for n, t in problem.tensors.items()}
        got = problem.run(moeops.moe_mlp, problem.tensors, grad)
        want = problem.run(reference.moe_mlp, exact, grad.double())
        for name, expected in want.items():
            assert_near(got[name], expected, dtype, name)
        monkeypatch.setenv("MOEOPS_KERNELS", "hopper")

    refused("the products are of", Problem.draw(plan, 64, 64, torch.float32))
    refused("widths must be multiples of 8", Problem.draw(plan, 64, 63, torch.bfloat16))
    odd = Problem.draw(plan, 64, 64, torch.bfloat16)
    x = odd.tensors["x"]
    odd.tensors["x"] = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x)
    odd.tensors["x"].copy_(x)
    refused("rows must begin at a multiple of 16", odd)
    strided = Problem.draw(plan, 64, 64, torch.bfloat16)
    w = strided.tensors["w_up"]
    strided.tensors["w_up"] = torch.stack([w, w], -1)[..., 0]
    refused("weights must have a stride of 1", strided)
    monkeypatch.setenv("MOEOPS_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="MOEOPS_KERNELS must be auto, general or hopper"):
        moeops.moe_mlp(plan=plan, activation="swiglu", **odd.tensors)
