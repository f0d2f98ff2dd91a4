"""FSMoE's six hooks on one rank: order, values and gradients against a plain float64 sum over the experts, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from moeops import FMoE, FMoETransformerMLP
from moeops.dispatch import Static
from moeops.dispatch.hooks import STAGES
from moeops.gates import NaiveGate, SoftMoEGate

D, H, E, T, K = 6, 5, 4, 9, 2
DISPATCHES = ("exact", "static", "static_in_parts")


class Hooks(nn.Module):
    """Six hooks with a parameter each; those on rows are not linear, so that their place matters."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterList(
            nn.Parameter(torch.rand(D, dtype=torch.float64) + 0.5) for _ in STAGES
        )

    def before_moe_start(self, x):
        return torch.tanh(x * self.factors[0])

    def before_dispatch(self, rows):
        return torch.sin(rows + self.factors[1])

    def after_dispatch(self, rows):
        return rows * rows * self.factors[2]

    def before_combine(self, rows):
        return torch.exp(rows * self.factors[3])

    def after_combine(self, rows):
        return torch.cos(rows - self.factors[4])

    def before_moe_end(self, y):
        return y * y + self.factors[5]

    def all(self):
        return {name: getattr(self, name) for name in STAGES}


def make(kind: str, dispatch: str, **options) -> FMoE:
    records = {"static": Static(8.0), "static_in_parts": Static(8.0, n_chunks=3)}
    options = {
        "top_k": K,
        "dtype": torch.float64,
        "dispatch": records.get(dispatch, dispatch),
        **options,
    }
    if kind == "mlp":
        return FMoETransformerMLP(E, D, H, activation="swiglu", **options)
    return FMoE(E, D, expert=lambda d_model: nn.Linear(d_model, D), **options)


def expert_of(layer: FMoE, index: int, rows):
    if isinstance(layer, FMoETransformerMLP):
        weights = layer.experts
        gate, up = (rows @ weights.w_up[index].T + weights.b_up[index]).chunk(2, -1)
        return (nn.functional.silu(gate) * up) @ weights.w_down[index].T + weights.b_down[index]
    return layer.experts[index](rows)


def dense(layer: FMoE, hooks: Hooks, x):
    """Every expert on every token, each row on its own; weights of experts that were not chosen are 0."""
    x = hooks.before_moe_start(x)
    logits = x @ layer.gate.gate.weight.T + layer.gate.gate.bias
    values, ids = logits.topk(K, -1)
    weights = torch.zeros_like(logits).scatter(1, ids, values.softmax(-1))
    total = 0
    for index in range(E):
        rows = hooks.after_dispatch(hooks.before_dispatch(x))
        rows = hooks.after_combine(hooks.before_combine(expert_of(layer, index, rows)))
        total = total + weights[:, index : index + 1] * rows
    return hooks.before_moe_end(total)


def gradients(y, x, *modules):
    wanted = [x, *(p for module in modules for p in module.parameters())]
    return torch.autograd.grad(y.square().sum(), wanted)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("kind", ["mlp", "modules"])
def test_values_and_gradients(kind, dispatch, compiled):
    torch.manual_seed(0)
    layer, hooks = make(kind, dispatch), Hooks()
    layer.set_stage_hooks(**hooks.all())
    run, counter = layer, CompileCounterWithBackend("aot_eager")
    if compiled:
        run = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (T,) if compiled else (T, 5, 1):
        x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
        y, expected = run(x), dense(layer, hooks, x)
        torch.testing.assert_close(y, expected)
        actual = gradients(y, x, layer, hooks)
        torch.testing.assert_close(actual, gradients(expected, x, layer, hooks))
    assert bool(counter.frame_count) is compiled


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("gate", [NaiveGate, lambda *args: SoftMoEGate(*args, num_slots=2)])
def test_hooks_that_return_nothing_see_every_stage_in_order(gate, dispatch):
    parts = 3 if dispatch == "static_in_parts" else 1
    torch.manual_seed(0)
    layer = make("mlp", dispatch, gate=gate)
    x, seen = torch.randn(3, 4, D, dtype=torch.float64), []
    expected = layer(x)
    layer.set_stage_hooks(
        **{name: lambda rows, name=name: seen.append((name, rows.shape)) for name in STAGES}
    )
    torch.testing.assert_close(layer(x), expected)
    names = [name for name, _ in seen]
    assert names[0] == STAGES[0]
    assert names[-1] == STAGES[-1]
    assert [names.count(name) for name in STAGES] == [1, *[parts] * 4, 1]
    assert names.index("before_dispatch") < names.index("after_dispatch")
    assert names.index("after_dispatch") < names.index("before_combine")
    assert names.index("before_combine") < names.index("after_combine")
    assert seen[0][1] == seen[-1][1] == (12, D)
    assert all(len(shape) == 2 and shape[1] == D for _, shape in seen)


def test_rows_may_change_type_and_structure_on_their_way():
    """Eight bits and a scale per row, which the receiver multiplies: no gradient passes integers."""
    layer = make("modules", "exact")
    x = torch.randn(T, D, dtype=torch.float64)
    expected = layer(x)

    def encode(rows):
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return {"codes": (rows / scale).round().to(torch.int8), "scale": scale.float()}

    def decode(coded):
        assert coded["codes"].dtype == torch.int8
        return coded["codes"].double() * coded["scale"]

    layer.set_stage_hooks(
        before_dispatch=encode, after_dispatch=decode, before_combine=encode, after_combine=decode
    )
    y = layer(x)
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=0, atol=0.05)


def test_setting_hooks_replaces_all_that_were_there():
    layer = make("mlp", "exact")
    x = torch.randn(T, D, dtype=torch.float64)
    plain = layer(x)
    layer.set_stage_hooks(before_moe_start=torch.zeros_like)
    layer.set_stage_hooks(before_moe_end=torch.neg)
    torch.testing.assert_close(layer(x), -plain)
    twin = copy.deepcopy(layer)
    layer.set_stage_hooks()
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(twin(x), -plain)


def test_masked_tokens_stay_hidden():
    layer = make("modules", "exact")
    x = torch.randn(T, D, dtype=torch.float64)
    mask = torch.arange(T) % 3 == 0
    layer.set_stage_hooks(before_dispatch=torch.Tensor.float, after_dispatch=torch.Tensor.double)
    y = layer(x, mask)
    assert torch.equal(y[mask], torch.zeros_like(y[mask]))
    torch.testing.assert_close(y[~mask], layer(x)[~mask])


def test_errors_name_the_hook():
    layer = make("modules", "exact")
    x = torch.randn(T, D, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"a hook must be one of \('before_moe_start'.*got 'before_gate'"
    ):
        layer.set_stage_hooks(before_gate=torch.neg)
    with pytest.raises(TypeError, match=r"before_combine must be a function.* got 3 \(int\)"):
        layer.set_stage_hooks(before_combine=3)
    for name in STAGES:
        layer.set_stage_hooks(**{name: lambda rows: rows[1:]})
        with pytest.raises(ValueError, match=rf"{name}: .* with \d+ entries in dimension 0"):
            layer(x)
    layer.set_stage_hooks(after_dispatch=lambda rows: [rows, "rows"])
    with pytest.raises(TypeError, match=r"after_dispatch: a hook must return tensors.*str"):
        layer(x)
    layer.set_stage_hooks(after_combine=lambda rows: {})
    with pytest.raises(ValueError, match="after_combine: a hook must return at least one tensor"):
        layer(x)


def test_compiled_code_sees_that_hooks_changed(fresh_dynamo):
    layer = make("mlp", "exact")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, D, dtype=torch.float64)
    plain = layer(x)

    def twice(y):
        return 2 * y

    for hook in (None, torch.neg, torch.Tensor.square, twice, lambda y: 3 * y, None):
        layer.set_stage_hooks(after_combine=None, before_moe_end=hook)
        torch.testing.assert_close(compiled(x), plain if hook is None else hook(plain))
    torch._dynamo.reset()  # or there are more graphs than Dynamo's limit
    for hook in (torch.Tensor.bfloat16, torch.Tensor.half, None):
        layer.set_stage_hooks(before_dispatch=hook, after_dispatch=torch.Tensor.double)
        assert torch.equal(compiled(x), layer(x))
