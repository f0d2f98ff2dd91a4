"""What every gate must do besides its maths: one graph under the compiler, export, no effect of recomputation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from moeops import FMoETransformerMLP
from tolerances import TOLERANCES

D, E = 8, 6
TOKENS = (5, 6, 12, 3, 17, 33, 1, 0)
# Older Inductors divide by zero when they launch a kernel with two-dimensional tiles for no elements
# (https://github.com/pytorch/pytorch/issues/178530).
ZERO_TOKENS = {"triton.max_tiles": 1} if torch.__version__ < (2, 13) else {}


def best(values, k):
    """The k largest entries per row, best first, ties by lower id."""
    return torch.sort(values.detach(), dim=-1, descending=True, stable=True).indices[:, :k]


def parameters_float64(gate):
    """Copies of the parameters as float64 leaves on the CPU, by name."""
    return {name: p.detach().cpu().double().requires_grad_() for name, p in gate.named_parameters()}


def layer_with(build, device="cpu", top_k=2):
    """The layer most people use, around the gate that ``build(d_model, num_expert, world_size, top_k)`` makes."""
    return FMoETransformerMLP(E, D, 12, activation="swiglu", top_k=top_k, gate=build).to(device)


def step(module, layer, x, seed=7):
    """Forward and backward with the loss: output, loss, every gradient and every buffer, by name."""
    torch.manual_seed(seed)
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    if hasattr(x, "_dynamo_unbacked_indices"):
        torch._dynamo.decorators.mark_unbacked(leaf, 0)
    y = module(leaf)
    total = y.square().sum()
    results = {"y": y.detach()}
    loss = layer.gate.get_loss()
    if loss is not None:
        total = total + 0.5 * loss
        results["loss"] = loss.detach()
    total.backward()
    results["x"] = leaf.grad
    results.update({f"grad {n}": p.grad for n, p in layer.named_parameters()})
    results.update({f"buffer {n}": b.clone() for n, b in layer.named_buffers()})
    return results


def assert_same(actual, expected):
    """Same names, and numbers that differ by no more than a changed order of sums explains."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=2e-5,
            atol=3e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_compile(build, device, backend, top_k=2, training=True):
    """Training steps with many token counts run in one graph, and do what eager mode does to the last buffer."""
    torch._dynamo.reset()
    counters.clear()
    layer = layer_with(build, device, top_k).train(training)
    other = copy.deepcopy(layer)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch._inductor.config.patch(fallback_random=True, **ZERO_TOKENS):
        for T in TOKENS:
            x = torch.randn(T, D, device=device)
            expected = step(other, other, x)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            assert_same(step(compiled, layer, x), expected)
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    # Without marks, torch makes the token count dynamic on its own when it changes: two graphs at most.
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for T in (7, 9, 12, 30):
        x = torch.randn(T, D, device=device)
        assert_same(step(compiled, layer, x), step(other, other, x))
    assert counter.frame_count <= 2


def check_export(build, device, strict, training, top_k=2):
    """An exported layer computes what the layer does for every token count, and leaves nothing behind."""
    layer = layer_with(build, device, top_k).train(training)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    tokens = torch.export.Dim("tokens", max=4096)
    x = torch.randn(6, D, device=device)
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({0: tokens},), strict=strict
    ).module()
    assert not layer.gate.has_loss
    for T in TOKENS:
        x = torch.randn(T, D, device=device)
        torch.manual_seed(2)
        actual = program(x)
        torch.manual_seed(2)
        torch.testing.assert_close(actual, copy.deepcopy(layer)(x))
    for module in (layer, program):
        for name, value in module.named_buffers():
            assert torch.equal(value, before[name]), name


class Checkpointed(nn.Module):
    """A layer whose activations are recomputed in the backward."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer = layer
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def check_checkpoint(build, compile_it, top_k=2):
    """Recomputation changes no number: loss and buffers are those of one forward."""
    layer = layer_with(build, top_k=top_k)
    plain, other = copy.deepcopy(layer), Checkpointed(layer, reentrant=False)
    module = other
    if compile_it:
        torch._dynamo.reset()
        module = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, D)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        assert_same(step(module, layer, x), step(plain, plain, x))
    assert not layer.gate.has_loss


class CaptureTests:
    """Compiled, exported and recomputed: for a file's ``class TestCapture``, which says with what gate.

    Attributes:
        build: static method, ``build(d_model, num_expert, world_size, top_k)`` makes the gate.
        top_k: ``K``.
    """

    build = None
    top_k = 2

    def test_compile(self, device):
        check_compile(self.build, device, "inductor", self.top_k)

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
    def test_export(self, strict, device):
        check_export(self.build, device, strict, training=True, top_k=self.top_k)

    def test_checkpoint(self):
        check_checkpoint(self.build, compile_it=False, top_k=self.top_k)


def gradcheck(gate, T=5):
    """Gradients of weights and loss to the tokens and every parameter, by finite differences."""
    gate = gate.double()
    names = [name for name, _ in gate.named_parameters()]

    def function(x, *values):
        torch.manual_seed(11)  # the same noise in every evaluation
        weights = torch.func.functional_call(gate, dict(zip(names, values, strict=True)), (x,))[1]
        loss = gate.get_loss()
        return weights if loss is None else (weights, loss)

    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in gate.parameters()]
    assert torch.autograd.gradcheck(function, (x, *values))


def assert_gradient(actual, expected, dtype, what):
    """As ``assert_close``; where the terms of the gradient cancel, to the rounding of terms near 0.1."""
    error = float((actual.detach().cpu().double() - expected).abs().max())
    scale = max(0.1, float(expected.abs().max()))
    assert error <= TOLERANCES[dtype] * scale, f"{what} in {dtype}: off by {error}, scale {scale}"
