"""Launches on a CUDA device: streams, graphs, devices, threads, cost."""

from __future__ import annotations

import threading

import pytest
import torch
from numba_prototypes import require_numba

require_numba()

import moeops.numba as prototype
import moeops.numba.gates as gallery
from host_syncs import no_host_syncs
from moeops import FMoETransformerMLP

pytestmark = pytest.mark.cuda


def test_current_stream(cuda_device):
    """On a side stream the op waits for what that stream does before, and for nothing else."""
    x = torch.zeros(64, 8, device=cuda_device)
    stream = torch.cuda.Stream()
    gallery.naive_topk(x, 1)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x[:, 5] = 3.0
        _, ids = gallery.naive_topk(x, 1)
    assert not stream.query()
    stream.synchronize()
    assert bool((ids == 5).all())


def test_no_synchronisation(cuda_device):
    x = torch.randn(64, 8, device=cuda_device, requires_grad=True)
    gallery.naive_topk(x, 2)[0].sum().backward()
    with no_host_syncs():
        gallery.naive_topk(x, 2)[0].sum().backward()


def test_cuda_graph(cuda_device):
    """A layer with a prototype gate, captured with its backward, follows new inputs."""
    layer = FMoETransformerMLP(6, 8, 12, activation="swiglu", top_k=2, gate=gallery.NaiveTopkGate)
    layer = layer.to(cuda_device)
    static = torch.randn(40, 8, device=cuda_device, requires_grad=True)

    def step():
        y = layer(static)
        return y, *torch.autograd.grad(y.square().sum(), [static, layer.gate.gate.weight])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            static.copy_(torch.randn(40, 8, device=cuda_device))
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(actual, expected)


def test_first_call_in_a_capture_is_refused(cuda_device):
    @prototype.row_kernel("test_launch::cold", "x[T, D] -> y[T, D]: x")
    def cold(x, y):
        for d in range(len(x)):
            y[d] = x[d] + 1

    x = torch.ones(4, 3, device=cuda_device)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(
            RuntimeError, match="test_launch::cold: the op must be called once before a CUDA graph"
        ),
        torch.cuda.graph(graph),
    ):
        cold(x)
    torch.cuda.synchronize()
    assert cold(x).tolist() == (x + 1).tolist()


def test_compiled_with_cuda_graphs(cuda_device):
    torch._dynamo.reset()
    layer = FMoETransformerMLP(6, 8, 12, activation="swiglu", top_k=2, gate=gallery.TopPGate)
    layer = layer.to(cuda_device)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(40, 8, device=cuda_device)
        results = []
        for module in (compiled, layer):
            torch.compiler.cudagraph_mark_step_begin()
            layer.zero_grad()
            y = module(x)
            y.square().sum().backward()
            results.append((y.detach().clone(), layer.gate.gate.weight.grad.clone()))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_thread_that_has_not_used_the_device(cuda_device):
    x = torch.randn(100, 8, device=cuda_device)
    expected = gallery.naive_topk(x, 2)
    # Blocks for the outputs are cached, so that nothing but the launch needs the context.
    spare = [torch.empty_like(out) for out in expected for _ in range(4)]
    del spare
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(gallery.naive_topk(x, 2))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_another_device(cuda_device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    x = torch.randn(100, 8, device="cuda:1", requires_grad=True)
    weights, ids = gallery.naive_topk(x, 2)
    weights.square().sum().backward()
    other = x.detach().to("cuda:0").requires_grad_()
    weights0, ids0 = gallery.naive_topk(other, 2)
    weights0.square().sum().backward()
    assert ids.device == x.device
    assert torch.equal(ids.cpu(), ids0.cpu())
    torch.testing.assert_close(x.grad.cpu(), other.grad.cpu())
    assert torch.cuda.current_device() == 0


def test_much_dynamic_shared_memory(cuda_device):
    from numba import cuda, float32

    @prototype.block_kernel(
        "test_launch::reverse",
        "x[N] -> y[N]: x",
        grid=1,
        threads=256,
        shared=lambda N: 4 * N,
    )
    @cuda.jit
    def reverse(x, y):
        stage = cuda.shared.array(0, float32)
        for i in range(cuda.threadIdx.x, x.shape[0], cuda.blockDim.x):
            stage[i] = x[i]
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, x.shape[0], cuda.blockDim.x):
            y[i] = stage[x.shape[0] - 1 - i]

    for n in (10, 20_000):  # 80 kB, more than a launch gets unasked
        x = torch.randn(n, device=cuda_device)
        assert torch.equal(reverse(x), x.flip(0))
    with pytest.raises(RuntimeError, match="test_launch::reverse: the launch must fit the device"):
        reverse(torch.randn(100_000, device=cuda_device))


def test_debug_mode_checks_logits(cuda_device):
    logits = torch.randn(4, 6, device=cuda_device)
    expected = gallery.naive_topk(logits, 2)
    gallery.naive_topk.debug = True
    try:
        actual = gallery.naive_topk(logits, 2)
        logits[2, 3] = float("nan")
        with pytest.raises(RuntimeError, match="logits must be finite, got NaN or infinity"):
            gallery.naive_topk(logits, 2)
    finally:
        gallery.naive_topk.debug = False
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0])


def test_repeated_calls_see_new_tensors_and_numbers(cuda_device):
    """A launch is planned once per sizes, types and numbers: only those may be remembered."""
    for k in (2, 3, 2):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            for _ in range(3):
                logits = torch.randn(64, 33, device=cuda_device).to(dtype)
                for x in (
                    logits,
                    logits.t().contiguous().t(),
                    torch.cat((logits, logits), 1)[:, :33],
                ):
                    weights, ids = gallery.naive_topk(x, k)
                    want, want_ids = gallery.naive_topk(x.cpu(), k)
                    assert torch.equal(ids.cpu(), want_ids)
                    torch.testing.assert_close(weights.cpu(), want)
    with pytest.raises(ValueError, match="top_k"):
        gallery.naive_topk(torch.randn(64, 33, device=cuda_device), 34)
