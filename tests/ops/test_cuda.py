"""What exists on CUDA only: graph capture, no copy to the host, more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch

import moeops
from cases import each
from host_syncs import no_host_syncs
from moeops import TokenPlan
from samples import Sample, mlp_tensors, op_cases

pytestmark = pytest.mark.cuda

CAPTURED = [
    (op, i)
    for op, cases in (
        ("topk_route", 2),
        ("topk_route_balance", 3),
        ("prototype_route", 1),
        ("relu_route", 1),
        ("noisy_topk_route", 1),
        ("chosen_weights", 1),
        ("alignment_sum", 1),
        ("score_sums", 2),
        ("sort_tokens", 2),
        ("count_tokens", 1),
        ("limit_capacity", 3),
        ("permute_tokens", 1),
        ("unpermute_tokens", 2),
        ("pad_rows", 1),
        ("unpad_rows", 1),
        ("grouped_linear", 2),
        ("moe_mlp", 2),
    )
    for i in range(cases)
]
captured_cases = pytest.mark.parametrize(
    ("op", "index"), CAPTURED, ids=[f"{op}_{i}" for op, i in CAPTURED]
)
capture_dtypes = pytest.mark.parametrize(
    "capture_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def cuda_case(op, index, dtype):
    # 16-byte rows everywhere, the shape that the fastest matrix kernels take.
    sample = Sample("dropped", T=256, K=2, E=8, D=64, H=32, dropped=0.1)
    return op_cases(op, sample, dtype, "cuda")[index].with_grad()


def as_tuple(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def run_with_gradients(function, inputs, directions):
    """Outputs, then the gradient of every input that asks for one; ``directions`` is filled on the first call."""
    outputs = as_tuple(function(*inputs))
    moving = [o for o in outputs if o.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    if not moving:
        return list(outputs)
    if not directions:
        directions.extend(torch.randn_like(o) for o in moving)
    return [*(o.detach() for o in outputs), *torch.autograd.grad(moving, wanted, directions)]


def new_values(inputs):
    """Other float values for the same problem; maps and ids stay."""
    return [
        torch.rand_like(t).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in inputs
    ]


@captured_cases
@capture_dtypes
def test_cuda_graph_capture(op, index, capture_dtype, cuda_device):
    case = cuda_case(op, index, capture_dtype)
    function, inputs, directions = case.as_function(), case.inputs(), []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run_with_gradients(function, inputs, directions)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_with_gradients(function, inputs, directions)
    for _ in range(2):
        fresh = new_values(inputs)
        with torch.no_grad():
            for static, value in zip(inputs, fresh, strict=True):
                static.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(
            captured, run_with_gradients(function, fresh, directions), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@captured_cases
@capture_dtypes
def test_reduce_overhead(op, index, capture_dtype, cuda_device, fresh_dynamo):
    case = cuda_case(op, index, capture_dtype)
    function, inputs, directions = case.as_function(), case.inputs(), []
    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    run_with_gradients(function, inputs, directions)
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        inputs = new_values(inputs)
        got = [t.clone() for t in run_with_gradients(compiled, inputs, directions)]
        want = run_with_gradients(function, inputs, directions)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.fixture
def no_host_sync():
    """Any wait of the host for the device raises while this fixture's function runs."""

    def guarded(function, *args):
        with no_host_syncs():
            return function(*args)

    return guarded


def test_the_sync_guard_sees_a_copy_to_the_host(cuda_device, no_host_sync):
    with pytest.raises(RuntimeError, match="synchroniz"):
        no_host_sync(lambda: torch.ones(1, device="cuda").item())


@capture_dtypes
@each("activation", ["swiglu", "gelu"])
@each("with_bias", [False, True], ids=["no_bias", "bias"])
def test_moe_mlp_never_waits_for_the_device(
    capture_dtype, activation, with_bias, cuda_device, no_host_sync
):
    sample = Sample("plain", T=512, K=4, E=16, D=64, H=32)
    plan = sample.plan("cuda")
    leaves = {
        n: t.requires_grad_()
        for n, t in mlp_tensors(sample, capture_dtype, "cuda", activation, with_bias).items()
    }

    def step():
        x, weights = leaves["x"], leaves["topk_weights"]
        rest = {n: t for n, t in leaves.items() if n not in ("x", "topk_weights")}
        y = moeops.moe_mlp(x, plan, weights, activation=activation, **rest)
        return torch.autograd.grad(y, leaves.values(), torch.ones_like(y))

    step()  # library handles and workspaces are made in the first call
    for grad in no_host_sync(step):
        assert grad.isfinite().all()


@capture_dtypes
def test_whole_layer_never_waits_for_the_device(capture_dtype, cuda_device, no_host_sync):
    sample = Sample("plain", T=512, K=4, E=16, D=64, H=32)
    tensors = mlp_tensors(sample, capture_dtype, "cuda", "swiglu", with_bias=False)
    x, w_up, w_down = (tensors[n].requires_grad_() for n in ("x", "w_up", "w_down"))
    router = torch.randn(64, 16, device="cuda", dtype=capture_dtype, requires_grad=True)

    def step():
        weights, ids = moeops.topk_route((x @ router).float(), sample.K)
        ids = moeops.limit_capacity(ids, sample.E, 200, priority=weights)
        plan = moeops.sort_tokens(ids, sample.E)
        y = moeops.moe_mlp(x, plan, weights, w_up, w_down)
        rows = moeops.permute_tokens(y, plan)
        padded = moeops.pad_rows(rows, plan.expert_offsets, 200)
        rows = moeops.unpad_rows(padded, plan.expert_offsets, rows.shape[0])
        rows = moeops.grouped_linear(rows, w_down.transpose(1, 2).contiguous(), plan.expert_offsets)
        y = moeops.unpermute_tokens(rows, plan, weights)
        return torch.autograd.grad(y, (x, router, w_up, w_down), torch.ones_like(y))

    step()
    for grad in no_host_sync(step):
        assert grad.isfinite().all()


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cuda_device):
    T, K, D = 2**19 + 3, 2, 2**11 + 8  # rows: 1048582 x 2056 = 2.16e9 elements
    N = T * K
    assert N * D > 2**31
    needed = 2 * (2 * N * D + 3 * T * D)  # rows, their gradient, x and y and its gradient in bytes
    free, _ = torch.cuda.mem_get_info()
    if free < 1.3 * needed:
        pytest.skip(
            f"needs {1.3 * needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free"
        )
    ids = torch.randint(0, 8, (T, K), device="cuda")
    plan = moeops.sort_tokens(ids, 8)
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    rows = moeops.permute_tokens(x, plan)
    # Rows on both sides of element 2^31, and the last one.
    at = torch.tensor([0, 2**31 // D - 1, 2**31 // D, 2**31 // D + 1, N - 1], device="cuda")
    assert torch.equal(rows[at], x[plan.row_to_pair[at].long() // K])
    weights = torch.full((T, K), 0.5, device="cuda")
    y = moeops.unpermute_tokens(rows, plan, weights)
    assert torch.equal(y, x)
    del y
    grad_rows, grad_weights = torch.ops.moeops.unpermute_tokens_backward(x, rows, *plan, weights)
    assert torch.equal(grad_rows[at], rows[at] * 0.5)
    pairs = plan.row_to_pair[at].long()
    want = rows[at].double().square().sum(-1)
    torch.testing.assert_close(grad_weights.view(-1)[pairs].double(), want, rtol=1e-5, atol=0)


def test_cpu_and_cuda_tensors_do_not_mix(cuda_device):
    plan = Sample("plain").plan()
    x = torch.randn(13, 8, device="cuda")
    with pytest.raises(ValueError, match=r"row_to_pair must be on cuda:0 like x, got .* on cpu"):
        moeops.permute_tokens(x, plan)
    with pytest.raises(RuntimeError, match=r"row_to_pair must be on the device of the first"):
        torch.ops.moeops.permute_tokens(x, *plan)
    cuda_plan = TokenPlan(*(t.cuda() for t in plan))
    with pytest.raises(
        ValueError, match=r"topk_weights must be on cuda:0 like rows, got .* on cpu"
    ):
        moeops.unpermute_tokens(torch.randn(26, 8, device="cuda"), cuda_plan, torch.ones(13, 2))
