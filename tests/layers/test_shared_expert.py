"""An expert for every token, against the layer without one and plain arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cases import each
from moeops import FMoE, FMoETransformerMLP
from moeops.gates import Llama4Gate, SoftMoEGate
from moeops.layers.shared import SharedMLP
from moeops.layers.walk import parameter_tags

D, H, S, E, T = 6, 5, 7, 4, 9


def make(form=None, gate=None, **options) -> FMoETransformerMLP:
    torch.manual_seed(2)
    options = {"shared_expert": S, "dtype": torch.float64, **options}
    if gate is not None:
        options["gate"] = gate
    return FMoETransformerMLP(E, D, H, shared_expert_gate=form, **options)


def without_shared(layer: FMoE) -> FMoE:
    """The same layer, with the same parameters and tensors, and no shared expert."""
    other = copy.copy(layer)
    other._modules = dict(layer._modules)
    other.shared_expert = other.shared_expert_gate = None
    return other


def mlp(x, parameters, activation):
    hidden = x @ parameters["up.weight"].T + parameters.get("up.bias", 0)
    if activation == "swiglu":
        hidden = F.silu(hidden[:, :S]) * hidden[:, S:]
    else:
        hidden = {"relu": F.relu, "gelu": F.gelu}.get(activation, activation)(hidden)
    return hidden @ parameters["down.weight"].T + parameters.get("down.bias", 0)


def expected_of(layer: FMoETransformerMLP, form, x, activation="gelu"):
    """PR-MoE's, Qwen2-MoE's and DeepSeek's formulas."""
    y = without_shared(layer)(x)
    shared = mlp(x, dict(layer.shared_expert.named_parameters()), activation)
    if form is None:
        return y + shared
    logits = x @ layer.shared_expert_gate.weight.T
    if form == "sigmoid":
        return y + shared / (1 + (-logits).exp())
    powers = (logits + layer.shared_expert_gate.bias).exp()
    return (powers[:, :1] * y + powers[:, 1:] * shared) / powers.sum(1, keepdim=True)


def assert_same_with_gradients(actual, expected, inputs) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(expected)
    got, want = (torch.autograd.grad((y * weights).sum(), inputs) for y in (actual, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@each("compiled", [False, True])
@each("form", [None, "sigmoid", "softmax"])
def test_each_form_is_its_formula(form, compiled):
    layer = make(form)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    assert_same_with_gradients(call(x), expected_of(layer, form, x), inputs)


@each("activation", ["swiglu", "relu", torch.tanh])
@each("bias", [True, False])
def test_a_width_has_the_form_of_the_experts(activation, bias):
    layer = make(activation=activation, bias=bias)
    assert (layer.shared_expert.up.bias is not None) == bias
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    expected = expected_of(layer, None, x, activation)
    assert_same_with_gradients(layer(x), expected, [x, *layer.parameters()])


def test_an_activation_with_parameters_is_copied():
    layer = make(activation=nn.PReLU(dtype=torch.float64))
    assert layer.shared_expert.activation is not layer.experts.activation
    assert "shared_expert.activation.weight" in layer.state_dict()


@each("gate", [SoftMoEGate, Llama4Gate])
def test_beside_other_kinds_of_routing(gate):
    layer = make("softmax", gate, top_k=1)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(
        layer(x), expected_of(layer, "softmax", x), [x, *layer.shared_expert.parameters()]
    )


@each("values", [None, {1: 0.5}])
def test_masked_tokens_see_nothing_of_it(values):
    layer = make("sigmoid", mask_dict=values)
    x = torch.randn(T, D, dtype=torch.float64)
    mask = torch.tensor([0, 1, 0, 2, 0, 1, 0, 0, 2])
    x[3] = float("nan")
    y = layer(x, mask)
    kept = mask == 0
    torch.testing.assert_close(y[kept], layer(x[kept]))
    torch.testing.assert_close(y[~kept], without_shared(layer)(x, mask)[~kept])
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    got = {name: p.grad.clone() for name, p in layer.shared_expert.named_parameters()}
    layer.zero_grad()
    layer(x[kept]).sum().backward()
    for name, parameter in layer.shared_expert.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


class Halves(nn.Module):
    """Maps a nest to a nest."""

    def __init__(self, d_model=D):
        super().__init__()
        self.linear = nn.Linear(d_model, 4)

    def forward(self, rows):
        return {"y": self.linear(rows["x"]).unflatten(1, (2, 2)), "z": rows["x"] * rows["scale"]}


def test_nests_and_modules_of_all_kinds():
    ready = Halves()
    for given in (Halves, ready):
        layer = FMoE(E, D, expert=Halves, shared_expert=given, shared_expert_gate="softmax")
        x = {"x": torch.randn(T, D), "scale": torch.rand(T, 1)}
        routed, shared = without_shared(layer)(x), layer.shared_expert(x)
        factors = F.softmax(F.linear(x["x"], *layer.shared_expert_gate.parameters()), -1)
        for name, leaf in layer(x).items():
            first, second = (f.view(T, *(1,) * (leaf.dim() - 1)) for f in factors.unbind(1))
            torch.testing.assert_close(leaf, first * routed[name] + second * shared[name])
    assert layer.shared_expert is ready


def test_no_tokens_and_any_shape():
    layer = make("sigmoid")
    for shape in ((0, D), (2, 0, D), (2, 3, D), (D,)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(
            layer(x).reshape(-1, D), expected_of(layer, "sigmoid", x.reshape(-1, D))
        )


def test_one_graph_for_every_number_of_tokens():
    layer = make("softmax", dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (3, 0, 8):
        x = torch.randn(num_tokens, D)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_types_and_autocast():
    x = torch.randn(T, D)
    layer = make("softmax", dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    mixed = FMoETransformerMLP(E, D, H, shared_expert=SharedMLP(D, S), dtype=torch.bfloat16)
    assert mixed.shared_expert.up.weight.dtype == torch.float32  # ready, so as it was
    layer = make("sigmoid", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), rtol=0.05, atol=0.05)


def test_state_dict_reset_and_meta():
    layer = make("softmax")
    shapes = {n: list(v.shape) for n, v in layer.state_dict().items() if n.startswith("shared")}
    assert shapes == {
        "shared_expert.up.weight": [S, D],
        "shared_expert.up.bias": [S],
        "shared_expert.down.weight": [D, S],
        "shared_expert.down.bias": [D],
        "shared_expert_gate.weight": [2, D],
        "shared_expert_gate.bias": [2],
    }
    other = make("softmax", device="meta").to_empty(device="cpu")
    other.reset_parameters()
    assert all(p.isfinite().all() and p.abs().sum() > 0 for p in other.parameters())
    other.load_state_dict(layer.state_dict())
    x = torch.randn(T, D, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    empty = nn.utils.skip_init(FMoETransformerMLP, E, D, H, shared_expert=S)
    assert not empty.shared_expert.up.weight.is_meta
    names = make("sigmoid", bias=False).state_dict()
    assert list(names["shared_expert_gate.weight"].shape) == [1, D]
    assert "shared_expert_gate.bias" not in names


def test_tags_of_a_dense_parameter():
    layer = make("softmax")
    tags = parameter_tags(layer)
    names = {name: tags[p] for name, p in layer.named_parameters()}
    assert {tag for name, tag in names.items() if name.startswith("shared_expert")} == {"dp"}
    assert layer.shared_expert.up.weight.dp_comm == "dp"
    assert parameter_tags(FMoE(E, D, expert=nn.Identity, shared_expert=nn.LazyLinear)) == {}


@each(
    "options, error, message",
    [
        ({"shared_expert_gate": "tanh"}, ValueError, "shared_expert_gate must be None or one of"),
        (
            {"shared_expert": None, "shared_expert_gate": "sigmoid"},
            ValueError,
            "without a shared_expert, got 'sigmoid'",
        ),
        ({"shared_expert": 0}, ValueError, "d_hidden must be at least 1, got 0"),
        ({"shared_expert": "wide"}, TypeError, "shared_expert must be a module.*'wide'"),
        ({"shared_expert": lambda d_model: d_model}, TypeError, "got int 6|got 6"),
    ],
)
def test_errors_when_built(options, error, message):
    with pytest.raises(error, match=message):
        FMoETransformerMLP(E, D, H, **{"shared_expert": S, **options})


class Odd(nn.Module):
    """Returns what nobody can add."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out(x)


@each(
    "out, error, message",
    [
        (lambda x: x[:, :2], ValueError, r"shape of the experts' output, \[9, 6\], got .*9, 2"),
        (lambda x: (x, x), ValueError, "structure of the experts"),
        (lambda x: x.long(), TypeError, "float tensors, got torch.int64"),
    ],
)
def test_errors_of_outputs(out, error, message):
    layer = FMoETransformerMLP(E, D, H, shared_expert=Odd(out))
    with pytest.raises(error, match=message):
        layer(torch.randn(T, D))


def test_a_width_needs_experts_of_a_known_form():
    with pytest.raises(TypeError, match=r"FMoE: shared_expert must be a module.*got 7"):
        FMoE(E, D, expert=nn.Identity, shared_expert=7)
