"""The Hopper kernels: awkward sizes, values that must not travel between experts, repeatability, and the rules.

Every check runs with ``MOEOPS_KERNELS=hopper``, so that a problem which the kernels refuse fails instead of
passing in the general ones.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import moeops
from moeops import Glu, TokenPlan, reference
from moeops.ops.activations import ACTIVATIONS, up_width
from samples import unit_for, unit_id
from tolerances import TOLERANCES

pytestmark = pytest.mark.cuda

HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
UNITS = (
    Glu(alpha=1.702, limit=0.7, offset=1.0, interleaved=True),
    Glu(limit=0.7),
    Glu(alpha=1.702, limit=0.7, offset=1.0),
    Glu("gelu_tanh", offset=-0.5, interleaved=True),
    Glu(interleaved=True),
)
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
    activation: str | Glu
    tensors: dict[str, Tensor]

    @classmethod
    def draw(cls, plan, D, H, dtype, activation="swiglu", bias=False, transposed=False):
        T, K = plan.pair_to_row.shape
        E = plan.expert_offsets.shape[0] - 1
        activation = unit_for(activation, dtype)
        up = up_width(H, activation)

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
        if isinstance(activation, Glu) and activation.limit is not None:
            # Exact pre-activations: a sum of many products that is rounded may pass the limit, where slopes jump.
            tensors["x"] = tensors["x"].clamp(-1, 1).round()
            tensors["w_up"] = (tensors["w_up"] * D**0.5).clamp(-1, 1).round() / 2 ** round(
                math.log2(D) / 2
            )
        if bias:
            tensors["b_up"] = torch.randn(E, up, device="cuda").round().to(dtype) / 4
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
@pytest.mark.parametrize("activation", [*ACTIVATIONS, *UNITS], ids=unit_id)
def test_activations_biases_and_major_orders(half, bias, transposed, activation):
    plan = plan_of(EDGES, top_k=3, spare=40)
    Problem.draw(plan, 200, 136, half, activation, bias, transposed).check(half)


@HALF
@pytest.mark.parametrize(("D", "H"), [(8, 8), (8, 72), (72, 8), (96, 96), (2880, 96), (96, 2880)])
@pytest.mark.parametrize("activation", ["swiglu", *UNITS[:2]], ids=unit_id)
def test_widths(half, activation, D, H):
    Problem.draw(plan_of(EDGES), D, H, half, activation).check(half)


@pytest.mark.parametrize("H", [*range(8, 105, 8), 184, 192, 200])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_every_width_of_rows_in_turns(H, transposed):
    """Ends of hidden rows in every chunk of 32 columns, those of the pre-activation in both of its chunks."""
    problem = Problem.draw(
        plan_of([65, 0, 130, 1, 64]), 72, H, torch.bfloat16, UNITS[0], True, transposed
    )
    problem.check(torch.bfloat16)


@HALF
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_rows_in_turns_are_the_same_bits_as_halves(half, transposed):
    """The same products and the same arithmetic, in another place."""
    unit = Glu(alpha=1.702, limit=0.7, offset=1.0)
    plan = plan_of([70, 65, 0, 130, 64], top_k=2)
    problem = Problem.draw(plan, 200, 136, half, unit, bias=True)

    def in_turns(t):
        return t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    turned = {n: in_turns(t) if n in ("w_up", "b_up") else t for n, t in problem.tensors.items()}
    if transposed:
        turned["w_up"] = turned["w_up"].mT.contiguous().mT
    other = Problem(plan, unit_for(unit, half)._replace(interleaved=True), turned)
    grad = torch.randn_like(problem.tensors["x"])
    want = problem.run(moeops.moe_mlp, problem.tensors, grad)
    got = other.run(moeops.moe_mlp, turned, grad)
    for name in ("y", "topk_weights", "w_down", "b_down"):
        assert torch.equal(got[name], want[name]), name
    for name in ("w_up", "b_up"):
        assert torch.equal(got[name], in_turns(want[name])), name
    assert_near(got["x"], want["x"].double(), half, "x")  # sums over gate and up in another order


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
    "up=c256:large:skip,down=c256:small:skip,dh=p128:large:whole,dx=c256:large:whole,dw_up=c256:4,dw_down=p192:9",
    "up=c256x2:large:whole,down=c256x2:small:whole,dh=p128:small:skip,dx=c256x2:large:skip,dw_up=p192:2,dw_down=p192:2",
]


@HALF
@pytest.mark.parametrize("tiles", TILES, ids=range(len(TILES)))
@pytest.mark.parametrize(("D", "H"), [(200, 136), (520, 392)])
def test_every_tile(half, tiles, D, H, monkeypatch):
    monkeypatch.setenv("MOEOPS_TILES", tiles)
    counts = [*EDGES, 1000, 3, 900]
    Problem.draw(plan_of(counts, top_k=2, spare=99), D, H, half).check(half)


@HALF
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(
    ("activation", "tile"),
    [("swiglu", "p192x2"), *itertools.product(["swiglu", *UNITS], ["p192", "p128"])],
    ids=unit_id,
)
def test_every_tile_of_the_backward(half, activation, transposed, tile, monkeypatch):
    plan = plan_of([*EDGES, 1000, 3], top_k=2, spare=99)
    problem = Problem.draw(plan, 200, 392, half, activation, True, transposed)
    for order in ("small:skip", "large:whole"):
        monkeypatch.setenv("MOEOPS_TILES", f"dh={tile}:{order}")
        problem.check(half)


@pytest.mark.parametrize("activation", ["swiglu", *UNITS[:2]], ids=unit_id)
def test_repeats_bitwise(activation):
    plan = plan_of([300, 0, 77, 1025, 64], top_k=3)
    problem = Problem.draw(plan, 392, 264, torch.bfloat16, activation)
    grad = torch.randn_like(problem.tensors["x"])
    first = problem.run(moeops.moe_mlp, problem.tensors, grad)
    for _ in range(20):
        for name, value in problem.run(moeops.moe_mlp, problem.tensors, grad).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("activation", ["swiglu", UNITS[0]], ids=unit_id)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_experts_values_stay_with_it(poison, activation):
    """NaN in one expert's tokens and weights reaches neither the rows nor the gradients of the others."""
    counts = [70, 65, 1, 130, 64]
    plan = plan_of(counts)
    problem = Problem.draw(plan, 200, 136, torch.bfloat16, activation)
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
        # A limit makes hidden rows of what is infinite finite.
        limited = name == "w_down" and isinstance(activation, Glu) and math.isinf(poison)
        assert limited or not got[name][sick].isfinite().all(), name


@pytest.mark.parametrize("activation", ["swiglu", UNITS[0]], ids=unit_id)
def test_rows_without_a_pair_stay_out(activation):
    """Tokens that nobody chose may be anything, and what lies in memory before a call as well."""
    counts = [70, 65, 0, 130]
    plan = plan_of(counts, top_k=4, spare=300)
    problem = Problem.draw(plan, 200, 136, torch.bfloat16, activation)
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


@pytest.mark.parametrize(
    "activation",
    ["swiglu", "geglu_tanh", Glu(alpha=1.702, offset=1.0, interleaved=True)],
    ids=unit_id,
)
def test_equals_the_general_kernels(activation, monkeypatch):
    plan = plan_of([300, 0, 77, 200], top_k=3)
    problem = Problem.draw(plan, 200, 136, torch.bfloat16, activation, bias=True)
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
