"""Layers against an independent composition in float64: values and the gradients of x, gate and experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_cases import GATES, D, E, H, ScaledTanh, different_experts, make_layer, run
from torch import nn

import moeops
from cases import each
from moeops import FMoE, FMoELinear, FMoETransformerMLP, Glu, reference
from moeops.gates import NaiveGate
from samples import UNITS
from tolerances import assert_close


def dense_mixture(x, ids, weights, experts):
    """Every expert on every token, weighted by what the gate gave that pair: no dispatch at all."""
    y = 0
    for e, expert in enumerate(experts):
        weight = (weights * (ids == e)).sum(1)  # [T]
        y = y + weight.reshape(-1, 1) * expert(x)
    return y


def mlp_experts(layer, activation):
    """The experts of a fused layer as functions of x, each on its slice of the weights."""

    def expert(e):
        def apply(x):
            hidden = x @ layer.experts.w_up[e].t()
            if layer.experts.b_up is not None:
                hidden = hidden + layer.experts.b_up[e]
            out = activation(hidden) @ layer.experts.w_down[e].t()
            return out if layer.experts.b_down is None else out + layer.experts.b_down[e]

        return apply

    return [expert(e) for e in range(layer.num_expert)]


def swiglu(hidden):
    gate, up = hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]
    return gate * torch.sigmoid(gate) * up


ACTIVATIONS = {
    "swiglu": ("swiglu", swiglu),
    "gelu": ("gelu", F.gelu),
    "GELU": (nn.GELU(), F.gelu),
    "relu": (nn.ReLU(), torch.relu),
    "silu": (F.silu, F.silu),
    "relu_squared": ("relu_squared", lambda h: torch.relu(h) ** 2),
    "gelu_tanh": (nn.GELU(approximate="tanh"), lambda h: F.gelu(h, approximate="tanh")),
    "function": (torch.sin, torch.sin),
    "geglu_tanh": ("geglu_tanh", lambda h: reference.activate(h, Glu("gelu_tanh"))),
    "unit": (UNITS[0], lambda h: reference.activate(h, UNITS[0])),
}


def check_against(layer, gate_of, experts_of, T=23, seed=7):
    """One forward and backward of the layer, and of the dense mixture over the same gate decisions."""
    x = torch.randn(T, layer.d_model, dtype=torch.float64)
    actual = run(layer, layer.gate, x, seed)
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    ids, weights = gate_of(leaf)
    y = dense_mixture(leaf, ids, weights, experts_of)
    total = y.square().sum()
    loss = layer.gate.get_loss()
    total = total if loss is None else total + 0.5 * loss
    total.backward()
    assert_close(actual["y"], y, torch.float64, "y")
    assert_close(actual["x"], leaf.grad, torch.float64, "gradient of x")
    for name, parameter in layer.named_parameters():
        assert_close(actual[name], parameter.grad, torch.float64, f"gradient of {name}")


@each("bias", [True, False], ids=["bias", "no_bias"])
@each("activation", ACTIVATIONS)
def test_transformer_mlp(activation, bias, device):
    given, function = ACTIVATIONS[activation]
    layer = FMoETransformerMLP(
        E, D, H, activation=given, bias=bias, dtype=torch.float64, device=device
    )
    if device == "cuda":
        x = torch.randn(23, D, dtype=torch.float64)
        y = layer(x.to(device))
        expected = layer.cpu()(x)
        assert_close(y, expected, torch.float64)
        return
    check_against(layer, layer.gate, mlp_experts(layer, function))
    composed = activation in ("gelu_tanh", "function")
    assert (layer.experts.fused_activation is None) == composed


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_with_the_fused_layer(gate, training):
    layer = make_layer("mlp", gate).double().train(training)
    check_against(layer, layer.gate, mlp_experts(layer, swiglu))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_with_expert_modules(gate, training):
    layer = make_layer("modules", gate).double().train(training)
    check_against(layer, layer.gate, list(layer.experts))


def test_fused_layer_equals_the_op_reference():
    layer = FMoETransformerMLP(E, D, H, activation="swiglu", dtype=torch.float64)
    x = torch.randn(19, D, dtype=torch.float64)
    ids, weights = layer.gate(x)
    plan = reference.sort_tokens(ids, E)
    expected = reference.moe_mlp(
        x,
        plan,
        weights,
        layer.experts.w_up,
        layer.experts.w_down,
        b_up=layer.experts.b_up,
        b_down=layer.experts.b_down,
        activation="swiglu",
    )
    assert_close(layer(x), expected, torch.float64)


@each("kind", ["mlp", "composed", "modules"])
def test_types(kind, dtype, device):
    layer = make_layer(kind, "naive", device).double()
    x = torch.randn(40, D, dtype=torch.float64, device=device).to(dtype)
    for parameter in layer.parameters():  # both layers hold the same rounded numbers
        parameter.data = parameter.data.to(dtype).double()
    expected = layer(x.double())
    y = layer.to(dtype)(x)
    assert y.dtype == dtype
    assert_close(y, expected, dtype)


@each("shape", [(0, D), (1, D), (2, 3, D), (2, 0, D), (D,), (2, 3, 2, D)])
@each("activation", ["gelu", torch.sin], ids=["fused", "composed"])
def test_transformer_mlp_keeps_the_shape(shape, activation, device):
    layer = FMoETransformerMLP(E, D, H, activation=activation, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    assert_close(y.reshape(-1, D), layer(x.reshape(-1, D)), torch.float32)
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad is not None for p in layer.experts.parameters())


def test_non_contiguous_tokens(device):
    layer = FMoETransformerMLP(E, D, H, device=device)
    x = torch.randn(D, 6, 5, device=device).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert_close(layer(x), layer(x.contiguous()), torch.float32)


def test_experts_may_change_the_width(device):
    layer = FMoE(3, D, expert=lambda d: nn.Linear(d, 5), dtype=torch.float64, device=device)
    x = torch.randn(11, D, dtype=torch.float64, device=device)
    ids, weights = layer.gate(x)
    assert_close(layer(x), dense_mixture(x, ids, weights, list(layer.experts)), torch.float64)
    assert len({id(expert) for expert in layer.experts}) == 3
    assert not torch.equal(layer.experts[0].weight, layer.experts[1].weight)


def test_expert_list_sets_the_number_of_experts():
    layer = FMoE(d_model=D, expert=different_experts())
    assert layer.num_expert == len(layer.experts) == layer.gate.tot_expert == 4
    ready = nn.Linear(D, D)
    assert FMoE(d_model=D, expert=[ready, nn.Identity()]).experts[0] is ready


def test_experts_without_tokens_get_zero_gradients(device):
    layer = FMoE(4, D, top_k=1, expert=lambda d: nn.Linear(d, d), device=device)
    with torch.no_grad():
        layer.gate.gate.bias.copy_(torch.tensor([100.0, 0.0, 0.0, 0.0]))
    layer(torch.randn(6, D, device=device)).square().sum().backward()
    assert float(layer.experts[0].weight.grad.abs().sum()) > 0
    for expert in list(layer.experts)[1:]:
        assert torch.equal(expert.weight.grad, torch.zeros_like(expert.weight))


class Nested(nn.Module):
    """Reads and returns nests: a dict of a 2-D and a 3-D tensor and a list with integers."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, inp):
        image, (position,) = inp["image"], inp["rest"]
        hidden = self.linear(inp["x"]) * position[:, None]
        return hidden, {"image": image * hidden.mean(1)[:, None, None]}


def test_nested_inputs_and_outputs(device):
    T = 10
    layer = FMoE(3, D, expert=Nested, dtype=torch.float64, device=device)
    inp = {
        "x": torch.randn(T, D, dtype=torch.float64, device=device, requires_grad=True),
        "image": torch.randn(T, 2, 3, dtype=torch.float64, device=device, requires_grad=True),
        "rest": [torch.arange(T, device=device)],
    }
    hidden, rest = layer(inp)
    ids, weights = layer.gate(inp["x"])
    parts = [expert(inp) for expert in layer.experts]
    want_hidden = want_image = 0
    for e, (part, other) in enumerate(parts):
        weight = (weights * (ids == e)).sum(1)
        want_hidden = want_hidden + weight[:, None] * part
        want_image = want_image + weight[:, None, None] * other["image"]
    assert_close(hidden, want_hidden, torch.float64)
    assert_close(rest["image"], want_image, torch.float64)
    leaves = [inp["x"], inp["image"], *layer.parameters()]
    grads = torch.autograd.grad(hidden.square().sum() + rest["image"].sin().sum(), leaves)
    want = torch.autograd.grad(want_hidden.square().sum() + want_image.sin().sum(), leaves)
    for grad, expected in zip(grads, want, strict=True):
        assert_close(grad, expected, torch.float64)


class SumGate(NaiveGate):
    """Reads the whole nest."""

    nested_input = True

    def forward(self, inp):
        return super().forward(inp[0] + inp[1])


class Add(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, inp):
        return self.linear(inp[0]) + inp[1]


def test_gate_that_reads_the_whole_nest():
    layer = FMoE(3, D, gate=SumGate, expert=Add, dtype=torch.float64)
    a, b = torch.randn(2, 7, D, dtype=torch.float64).unbind(0)
    ids, weights = NaiveGate.forward(layer.gate, a + b)
    expected = dense_mixture((a, b), ids, weights, list(layer.experts))
    assert_close(layer((a, b)), expected, torch.float64)


@each("where", ["constructor", "call"])
@each("kind", ["mlp", "modules"])
def test_masked_tokens_skip_the_experts(kind, where, device):
    T = 9
    row = torch.randn(D, dtype=torch.float64, device=device)
    mask = torch.tensor([0, 1, 2, 0, 3, 0, 1, 0, 0], device=device)
    options = {"mask_dict": {1: 0.5, 2: row}}
    if where == "constructor":
        options["mask"] = mask
    layer = make_layer(kind, "naive", device, **options).double()
    assert "mask" not in layer.state_dict()
    x = torch.randn(T, D, dtype=torch.float64, device=device, requires_grad=True)
    y = layer(x) if where == "constructor" else layer(x, mask)
    _, weights = layer.gate(x)
    total = weights.sum(1, keepdim=True)  # [T, 1]
    layer.mask = None
    expected = layer(x).clone()
    expected[mask == 1] = 0.5 * total[mask == 1].expand(-1, D)
    expected[mask == 2] = row * total[mask == 2]
    expected[mask == 3] = 0
    assert_close(y, expected, torch.float64)
    (grad,) = torch.autograd.grad(y[mask == 3].sum(), x)
    assert float(grad.abs().sum()) == 0


def test_mask_takes_any_shape_and_bool():
    layer = make_layer("mlp", "naive")
    x = torch.randn(2, 3, D)
    mask = torch.tensor([[False, True, False], [True, False, False]])
    y = layer(x, mask)
    assert torch.equal(y[mask], torch.zeros(2, D))
    assert_close(y[~mask], layer(x)[~mask], torch.float32)


@pytest.mark.parametrize("kind", ["mlp", "modules"])
def test_gate_hook_sees_every_decision(kind):
    seen = []
    layer = make_layer(kind, "gshard", gate_hook=lambda *args: seen.append(args))
    x = torch.randn(6, D)
    torch.manual_seed(1)
    layer(x)
    torch.manual_seed(1)
    ids, weights = layer.gate(x)
    ((hook_ids, hook_weights, nothing),) = seen
    assert torch.equal(hook_ids, ids)
    assert torch.equal(hook_weights, weights)
    assert nothing is None


class Fused(FMoE):
    """FastMoE's way to a fused expert: a subclass that sets ``experts``."""

    def __init__(self, **options):
        super().__init__(expert=None, **options)
        self.experts = FMoELinear(self.num_expert, self.d_model, 6, dtype=torch.float64)


def test_subclass_with_fused_experts():
    layer = Fused(num_expert=3, d_model=D, top_k=2, dtype=torch.float64)
    x = torch.randn(8, D, dtype=torch.float64)
    ids, weights = layer.gate(x)
    experts = [
        lambda x, e=e: F.linear(x, layer.experts.weight[e], layer.experts.bias[e]) for e in range(3)
    ]
    assert_close(layer(x), dense_mixture(x, ids, weights, experts), torch.float64)


def test_gate_as_class_factory_and_module():
    assert type(FMoETransformerMLP(E, D, H).gate) is NaiveGate
    assert FMoETransformerMLP(E, D, H, gate_bias=False).gate.gate.bias is None
    made = FMoETransformerMLP(
        E, D, H, top_k=3, gate=lambda *args: NaiveGate(*args, gate_bias=False)
    )
    assert made.gate.gate.bias is None
    assert made.gate.top_k == 3
    ready = NaiveGate(D, E, 1, 3)
    layer = FMoETransformerMLP(E, D, H, gate=ready)
    assert layer.gate is ready
    assert layer.top_k == 3


class OpenGate(NaiveGate):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_gate_bias_reaches_a_subclass_that_hands_its_keywords_on():
    assert FMoETransformerMLP(E, D, H, gate=OpenGate, gate_bias=False).gate.gate.bias is None


def test_positional_order_is_fastmoe_s():
    mask = torch.tensor([0, 1])
    layer = FMoE(
        3,
        D,
        1,
        None,
        None,
        None,
        1,
        NaiveGate,
        lambda d: nn.Linear(d, d),
        print,
        mask,
        {1: 2.0},
        False,
    )
    assert (layer.num_expert, layer.d_model, layer.top_k) == (3, D, 1)
    assert layer.gate_hook is print
    assert layer.mask is mask
    assert layer.mask_dict == {1: 2.0}
    assert layer.gate.gate.bias is None
    mlp = FMoETransformerMLP(3, D, H, nn.ReLU(), "dp", 2)
    assert (mlp.num_expert, mlp.d_model, mlp.d_hidden, mlp.expert_rank) == (3, D, H, 2)
    assert mlp.experts.fused_activation == "relu"
    assert mlp.experts.w_up.dp_comm == "dp"


def test_state_dict_names_and_shapes():
    layer = FMoETransformerMLP(E, D, H, activation="swiglu")
    assert {name: tuple(v.shape) for name, v in layer.state_dict().items()} == {
        "gate.gate.weight": (E, D),
        "gate.gate.bias": (E,),
        "experts.w_up": (E, 2 * H, D),
        "experts.b_up": (E, 2 * H),
        "experts.w_down": (E, D, H),
        "experts.b_down": (E, D),
    }
    gelu = FMoETransformerMLP(E, D, H, bias=False)
    composed = FMoETransformerMLP(E, D, H, bias=False, activation=ScaledTanh())
    assert gelu.state_dict()["experts.w_up"].shape == (E, H, D)
    extra = set(composed.state_dict()) - set(gelu.state_dict())
    assert extra == {"experts.activation.scale"}


def test_every_expert_starts_like_a_linear_layer():
    layer = FMoETransformerMLP(8, 64, 256, activation="swiglu")
    for tensor, fan_in in (
        (layer.experts.w_up, 64),
        (layer.experts.b_up, 64),
        (layer.experts.w_down, 256),
        (layer.experts.b_down, 256),
    ):
        bound = fan_in**-0.5
        assert float(tensor.detach().abs().max()) <= bound
        assert float(tensor.detach().abs().max()) > 0.97 * bound
        assert abs(float(tensor.detach().std()) / (bound / 3**0.5) - 1) < 0.05


@pytest.mark.parametrize("kind", ["mlp", "composed", "modules"])
def test_reset_parameters_draws_all_of_them_again(kind):
    layer = make_layer(kind, "switch")
    kept = {"experts.activation.scale"}
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in kept), name


def test_meta_device_and_materialisation():
    layer = FMoETransformerMLP(E, D, H, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert all(bool(p.isfinite().all()) for p in layer.parameters())
    assert layer.experts.w_up.dp_comm == "none"
    assert layer.gate.gate.weight.dp_comm == "gate"
    other = FMoE(E, D, expert=lambda d: nn.Linear(d, d), device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in other.parameters()} == {("meta", torch.float64)}


def test_parallel_tags():
    layer = make_layer("modules", "naive")
    assert not any(hasattr(p, "dp_comm") for p in layer.parameters())
    layer.mark_parallel_comm("moe")
    assert {p.dp_comm for p in layer.experts.parameters()} == {"moe"}
    assert {p.dp_comm for p in layer.gate.parameters()} == {"gate"}


def test_repr_names_the_sizes():
    text = repr(FMoETransformerMLP(E, D, H, activation="swiglu"))
    for piece in (
        "num_expert=4",
        "d_model=8",
        "top_k=2",
        "d_hidden=12",
        "activation='swiglu'",
        "bias=True",
    ):
        assert piece in text


def test_exports():
    assert moeops.FMoE is FMoE
    assert moeops.FMoELinear is FMoELinear
    assert moeops.FMoETransformerMLP is FMoETransformerMLP
    assert moeops.gates.NaiveGate is NaiveGate
