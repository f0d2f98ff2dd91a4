"""A layer's mask in every gate: masked tokens are as good as not there, whatever they hold."""

from __future__ import annotations

import copy

import pytest
import torch
from every_gate import GATES
from gate_checks import D, E
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cases import each
from host_syncs import no_host_syncs
from moeops import FMoE, FMoETransformerMLP, LoadMonitor
from moeops.gates import BaseGate, GShardGate, NaiveGate, SwitchGate

# Two sequences of eight tokens that are there. Noise for 6 * 16 and for 6 * 24 numbers begins alike.
REAL = 16
LAYOUTS = {
    "behind": [0] * REAL + [1, 2, 1, 1, 3, 1, 1, 1],
    "before": [1] * 5 + [0] * REAL,
    "between": [0, 1, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0][:24],
    "nobody": [1] * 6,
}


def build(name, device="cpu", **options):
    gate, top_k, _, _ = GATES[name]
    layer = FMoETransformerMLP(E, D, 12, activation="swiglu", top_k=top_k, gate=gate, **options)
    return layer.double().to(device)


def step(call, layer, x, mask=None):
    """Forward and backward with all named losses: outputs and gradients of the tokens that are there, and the rest."""
    torch.manual_seed(5)
    monitor = LoadMonitor(layer)
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    y = call(leaf, mask)
    factors = torch.linspace(0.5, 1.5, D, dtype=x.dtype, device=x.device)
    total = (y * factors).square().sum()
    loss = layer.gate.get_loss()
    results = {}
    if loss is not None:
        total = total + loss
        results["loss"] = loss.detach()
    total.backward()
    there = slice(None) if mask is None else mask == 0
    results["y"], results["grad x"] = y[there].detach(), leaf.grad[there]
    if mask is not None:
        assert not y[mask != 0].any()
        assert not leaf.grad[mask != 0].any()
    results.update({f"grad {n}": p.grad for n, p in layer.named_parameters()})
    results.update({f"buffer {n}": b.clone() for n, b in layer.named_buffers()})
    load = monitor.summary()[""]
    monitor.remove()
    results["loads"] = load.loads
    results["counts"] = torch.tensor([load.tokens, load.without_expert])
    return results


def assert_same(actual, expected, rtol=1e-6, atol=1e-9):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None
            continue
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda t, n=name: f"{n}: {t}"
        )


def with_padding(x, mask, value):
    """The tokens of ``x`` where the mask is 0, and rows of ``value`` elsewhere."""
    both = x.new_full((mask.shape[0], x.shape[1]), value)
    both[mask == 0] = x
    return both


def add_losses(layer):
    if layer.gate.has_logits:
        for name in ("z", "entropy", "switch", "gshard"):
            layer.gate.add_loss(name, 0.1)


@each("training", [True, False], ids=["train", "eval"])
@each("layout", LAYOUTS)
@pytest.mark.parametrize("name", GATES)
def test_as_if_alone(name, layout, training, device):
    _, _, draws, places = GATES[name]
    if layout not in ("behind", "nobody") and (places or draws):
        pytest.skip("its choices are others at other places")
    if draws and device == "cuda":
        pytest.skip("the noise of the first tokens depends on how many there are")
    layer = build(name, device).train(training)
    add_losses(layer)
    other = copy.deepcopy(layer)
    mask = torch.tensor(LAYOUTS[layout], device=device)
    x = torch.randn(int((mask == 0).sum()), D, dtype=torch.float64, device=device)
    want = step(other, other, x)
    assert_same(step(layer, layer, with_padding(x, mask, float("nan")), mask), want)


COMPILED = (
    "switch", "gshard_batch", "deepspeed_2", "tutel", "noisy", "ktop1", "sam", "dense_to_sparse", "threshold", "remoe",
    "expert_choice", "base", "soft_sequences", "deepseek_sequences", "hash", "forced_balance_gate",
)  # fmt: skip


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_for_all_masks(name, device):
    layer = build(name, device)
    add_losses(layer)
    other = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)

    def call(leaf, mask):
        torch._dynamo.decorators.mark_unbacked(leaf, 0)
        torch._dynamo.decorators.mark_unbacked(mask, 0)
        return compiled(leaf, mask)

    def plain(call, layer, x, mask):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        y = call(leaf, mask)
        loss = layer.gate.get_loss()
        (y.square().sum() + (0 if loss is None else loss)).backward()
        return {"y": y, "x": leaf.grad, **{n: b.clone() for n, b in layer.named_buffers()}}

    with torch._inductor.config.patch(fallback_random=True):
        for tokens in (12, 1, 0, 30):
            mask = torch.randint(2, (tokens,), device=device)
            x = torch.randn(tokens, D, dtype=torch.float64, device=device)
            x[mask != 0] = float("inf")
            assert_same(plain(call, layer, x, mask), plain(other, other, x, mask.clone()))
    assert counter.frame_count == 1


@pytest.mark.cuda
@pytest.mark.parametrize("name", GATES)
def test_no_host_sync(name, cuda_device):
    layer = build(name, cuda_device)
    add_losses(layer)
    x = torch.randn(32, D, dtype=torch.float64, device=cuda_device, requires_grad=True)
    mask = torch.randint(2, (32,), device=cuda_device)
    ones = torch.ones_like(x)
    layer(x, mask).backward(ones)
    with no_host_syncs():
        layer(x, mask).backward(ones)


def test_capacity_is_that_of_the_tokens_that_are_there(device):
    """Four of eight tokens want expert 0 of two with a factor of 1: it takes two, the first that are there."""
    layer = FMoETransformerMLP(
        2, D, 12, top_k=1, gate=lambda *args: SwitchGate(*args, capacity=1.0)
    ).to(device)
    layer.eval()
    with torch.no_grad():
        layer.gate.gate.weight.zero_()
        layer.gate.gate.bias.copy_(torch.tensor([1.0, 0.0]))
    seen = []
    layer.routing_hooks = (lambda layer, x, routing: seen.append(routing.topk_ids),)
    layer(torch.randn(8, D, device=device), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], device=device))
    assert seen[0].flatten().tolist() == [-1] * 4 + [0, 0, -1, -1]


class Blind(NaiveGate):
    """A gate written without a mask, which notes what it sees."""

    def forward(self, inp):
        self.seen = inp.detach().clone()
        return super().forward(inp)


class Open(GShardGate):
    """A gate that hands on what it does not know."""

    def forward(self, inp, **options):
        return super().forward(inp, **options)


def test_gates_of_ones_own():
    assert not BaseGate.takes_mask
    assert not Blind.takes_mask
    assert Open.takes_mask
    x, mask = torch.randn(6, D), torch.tensor([0, 1, 0, 0, 1, 0])
    x[mask != 0] = float("nan")
    layer = FMoETransformerMLP(E, D, 12, gate=Blind)
    y = layer(x, mask)
    assert torch.equal(layer.gate.seen, torch.where((mask == 0)[:, None], x, 0))
    assert bool(y.isfinite().all())
    assert not y[mask != 0].any()
    assert torch.equal(y[mask == 0], layer(x[mask == 0]))


class Wrapper(nn.Module):
    """Passes attributes on, as torch's wrappers for checkpointing do."""

    def __init__(self, gate):
        super().__init__()
        self.inner = gate

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(self.inner, *args, use_reentrant=False, **kwargs)


def test_a_gate_that_is_recomputed_gets_its_mask_again():
    plain = FMoETransformerMLP(E, D, 12, gate=GShardGate).double()
    layer = copy.deepcopy(plain)
    layer.gate = Wrapper(layer.gate)
    mask = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    x = torch.randn(7, D, dtype=torch.float64)
    grads = []
    for module in (plain, layer):
        torch.manual_seed(1)
        y = module(x, mask)
        (y.square().sum() + module.gate.get_loss()).backward()
        grads.append([p.grad for p in module.parameters()])
    for actual, want in zip(*grads, strict=True):
        torch.testing.assert_close(actual, want)


def test_an_added_loss_of_ones_own():
    seen = []

    def blind(logits, topk_ids):
        seen.append(topk_ids)
        return logits.sum() * 0

    def knowing(logits, topk_ids, mask):
        seen.append(mask)
        return logits.sum() * 0

    layer = FMoETransformerMLP(E, D, 12)
    layer.gate.add_loss(blind).add_loss(knowing)
    mask = torch.tensor([0, 1, 0, 0])
    layer(torch.randn(4, D), mask)
    assert seen[0][1].tolist() == [-1, -1]
    assert torch.equal(seen[1], mask)
    layer(torch.randn(4, D))
    assert seen[3] is None


@pytest.mark.parametrize("kind", ["mlp", "modules"])
def test_mask_dict_takes_the_weights_before_any_drop(kind):
    """Experts have room for one pair and drop nearly all; a masked token's two weights add up to 1 all the same."""

    def gate(*args):
        return GShardGate(*args, capacity=0.01, random_routing=False)

    if kind == "mlp":
        layer = FMoETransformerMLP(E, D, 12, gate=gate, mask_dict={1: 0.5})
    else:
        layer = FMoE(E, D, expert=lambda d: nn.Linear(d, d), gate=gate, mask_dict={1: 0.5})
    x, mask = torch.randn(40, D), torch.arange(40) % 2
    x[1] = float("nan")
    x.requires_grad_()
    y = layer(x, mask)
    torch.testing.assert_close(y[mask == 1], torch.full((20, D), 0.5))
    (y.square().sum() + layer.gate.get_loss()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    assert bool(x.grad.isfinite().all())
