"""The router of every gate is a module: what hooks, wrappers and replacements do to it is what the gate does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gate_classes
from moeops import FMoETransformerMLP
from moeops.gates import BASEGate, NaiveGate, RouterLinear
from tolerances import assert_close

D, E, T = 8, 10, 24


def numba_gate(d_model, num_expert):
    """A gate around an op that was written in Python."""
    numba = pytest.importorskip("moeops.numba")
    from moeops.numba.gates import naive_topk

    return numba.as_gate(naive_topk)(d_model, num_expert)


def routers(gate):
    """The names of the routers in a gate."""
    return [name for name, module in gate.named_modules() if isinstance(module, RouterLinear)]


BUILDS = {
    cls.__name__: lambda d_model, num_expert, cls=cls: gate_classes.make_gate(
        cls, d_model, num_expert
    )
    for cls in gate_classes.CLASSES
    if cls.__name__ not in ("HashGate", "SoftMoEGate", "ZeroGate")
}
EVERY_GATE = pytest.mark.parametrize(
    "build", [*BUILDS.values(), numba_gate], ids=[*BUILDS, "Numba"]
)


def run(gate, x, seed=3):
    """Ids, weights and loss of one forward."""
    torch.manual_seed(seed)
    ids, weights = gate(x)[:2]
    return ids, weights, gate.get_loss()


def assert_equal(actual, expected):
    """The same decision, to the bit for the ids and to rounding for the rest."""
    assert torch.equal(actual[0], expected[0])
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, torch.float32)


@EVERY_GATE
def test_hooks_run_once_and_count(build):
    """A hook that doubles the router's output is a router with doubled parameters."""
    gate = build(D, E)
    other = copy.deepcopy(gate)
    calls = []
    for name in routers(gate):
        assert gate.get_submodule(name).weight.dtype == torch.float32

        def double(module, args, output, name=name):
            calls.append(name)
            assert_close(output, F.linear(args[0], module.weight, module.bias), torch.float32)
            return 2 * output

        gate.get_submodule(name).register_forward_hook(double)
        with torch.no_grad():
            for parameter in other.get_submodule(name).parameters():
                parameter.mul_(2)
    x = torch.randn(T, D)
    assert_equal(run(gate, x), run(other, x))
    assert sorted(calls) == sorted(routers(gate))
    assert calls


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, its own parameters frozen."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def replace(gate, make):
    """Put ``make(router)`` in the place of every router."""
    for name in routers(gate):
        parent, _, child = name.rpartition(".")
        setattr(gate.get_submodule(parent), child, make(gate.get_submodule(name)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@EVERY_GATE
def test_adapters_act_and_learn(build, compiled):
    gate = build(D, E)
    merged = copy.deepcopy(gate)
    names = routers(gate)
    replace(gate, Adapter)
    for name in names:
        adapter = gate.get_submodule(name)
        with torch.no_grad():
            change = adapter.up.weight @ adapter.down.weight
            merged.get_submodule(name).weight.add_(change)
    if compiled:
        torch._dynamo.reset()
    module = torch.compile(gate, fullgraph=True, backend="eager") if compiled else gate
    x = torch.randn(T, D)
    torch.manual_seed(3)
    ids, weights = module(x)[:2]
    loss = gate.get_loss()
    torch.manual_seed(3)
    want_ids, want_weights = merged(x)[:2]
    assert torch.equal(ids, want_ids)
    assert_close(weights, want_weights, torch.float32)
    want_loss = merged.get_loss()
    total, want = weights.square().sum(), want_weights.square().sum()
    if loss is not None:
        assert_close(loss, want_loss, torch.float32)
        total, want = total + loss, want + want_loss
    total.backward()
    want.backward()
    for name in names:
        adapter, grad = gate.get_submodule(name), merged.get_submodule(name).weight.grad
        assert_close(adapter.up.weight.grad, grad @ adapter.down.weight.t(), torch.float32)
        assert_close(adapter.down.weight.grad, adapter.up.weight.t() @ grad, torch.float32)


@EVERY_GATE
def test_parameters_may_be_elsewhere_until_the_router_is_called(build):
    gate = build(D, E).requires_grad_(False)
    x = torch.randn(T, D)
    expected = run(gate, x)
    for name in routers(gate):
        router = gate.get_submodule(name)
        kept = dict(router.named_parameters())

        def bring(module, args, kept=kept):
            for key, value in kept.items():
                setattr(module, key, value)

        def take(module, args, output, kept=kept):
            for key, value in kept.items():
                setattr(module, key, nn.Parameter(value.to("meta"), requires_grad=False))

        router.register_forward_pre_hook(bring)
        router.register_forward_hook(take)
        take(router, (), None)
    assert_equal(run(gate, x), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@EVERY_GATE
def test_a_plain_linear_computes_in_its_own_type(build, autocast):
    """Logits are those of a bfloat16 product, and everything behind them is float32."""
    gate = build(D, E)
    gate = gate if autocast else gate.bfloat16()
    other = copy.deepcopy(gate)

    def plain(router):
        linear = nn.Linear(D, router.out_features, bias=router.bias is not None)
        linear.load_state_dict(router.state_dict())
        return linear.to(router.weight.dtype)

    replace(gate, plain)

    def round_product(module, args, output):
        values = (args[0], module.weight, module.bias)
        rounded = [None if v is None else v.bfloat16() for v in values]
        with torch.autocast("cpu", enabled=False):
            return F.linear(*rounded).float()

    for name in routers(other):
        other.get_submodule(name).register_forward_hook(round_product)
    x = torch.randn(T, D).to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = run(gate, x), run(other, x)
    assert actual[1].dtype == torch.float32
    assert_equal(actual, expected)


@pytest.mark.filterwarnings("ignore")  # of what replaces torch.ao
def test_a_quantised_linear():
    layer = FMoETransformerMLP(E, D, 16, top_k=E).eval()
    x = torch.randn(T, D)
    expected = layer(x)
    linear = nn.Linear(D, E)
    linear.load_state_dict(layer.gate.gate.state_dict())
    layer.gate.gate = linear
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.gate.gate) is not nn.Linear
    assert 0 < (quantised(x) - expected).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_router_linear_is_exact_in_every_type(dtype):
    router = RouterLinear(D, E).to(dtype)
    x = torch.randn(T, D).to(dtype)
    want = F.linear(x.double(), router.weight.double(), router.bias.double())
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = router(x)
        assert logits.dtype == kept
        assert_close(logits, want, kept)
    assert dict(router.state_dict()).keys() == dict(nn.Linear(D, E).state_dict()).keys()


def test_router_linear_keeps_its_values_in_float32():
    router = RouterLinear(D, E, keep_float32=True)
    router(torch.randn(T, D)).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in router.parameters()]
    router.bfloat16()
    for parameter, (value, grad) in zip(router.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)
    assert RouterLinear(D, E, keep_float32=True, device="meta").half().weight.dtype == torch.float32


def test_reset_draws_orthogonal_centroids_again():
    layer = FMoETransformerMLP(E, D, 16, top_k=1, gate=BASEGate)
    before = layer.gate.gate.weight.detach().clone()
    layer.reset_parameters()
    weight = layer.gate.gate.weight.detach()
    assert not torch.equal(weight, before)
    assert_close(weight.t() @ weight, 0.01 * torch.eye(D), torch.float32)


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        (lambda x: x[:3], ValueError, r"the router's output must have size 24 in dimension 0"),
        (lambda x: x.sum(1), ValueError, r"the router's output must have 2 dimensions"),
        (lambda x: x.int(), TypeError, r"the router's output must be float64.*got torch\.int32"),
        (lambda x: None, TypeError, r"the router's output must be a tensor, got None"),
    ],
)
def test_what_another_router_returns_is_checked(output, error, match):
    class Router(nn.Module):
        def forward(self, x):
            return output(x)

    gate = NaiveGate(D, E)
    gate.gate = Router()
    with pytest.raises(error, match=f"router_logits: {match}"):
        gate(torch.randn(T, D))
