"""Experts do with their rows what they like: write into them, return views of them, keep statistics."""

from __future__ import annotations

import pytest
import torch
from layer_cases import D, E, assert_same, run
from torch import nn

from moeops import FMoE, FMoETransformerMLP
from moeops.distributed import Static
from moeops.gates import SoftMoEGate

T = 23


class AddInPlace(nn.Module):
    """A residual expert that adds to its rows and returns them."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, rows):
        rows += torch.tanh(self.linear(rows.clone()))
        return rows

    def written_out(self, rows):
        return rows + torch.tanh(self.linear(rows))


class ReluInPlace(nn.Module):
    """A pre-activation block, as nn.Sequential(nn.ReLU(inplace=True), ...) begins."""

    def __init__(self, d_model):
        super().__init__()
        self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(d_model, d_model)

    def forward(self, rows):
        return self.linear(self.relu(rows))

    def written_out(self, rows):
        return self.linear(torch.relu(rows))


class WriteColumns(nn.Module):
    """Scales a view of its rows in place, and returns another view."""

    def __init__(self, d_model):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, rows):
        rows[:, ::2].mul_(self.scale)
        return rows.view(-1, 2, rows.shape[1] // 2).flip(1)[:, :, :3].flatten(1)

    def written_out(self, rows):
        even = torch.arange(rows.shape[1], device=rows.device) % 2 == 0
        rows = torch.where(even, rows * self.scale, rows)
        return torch.cat((rows[:, D // 2 : D // 2 + 3], rows[:, :3]), 1)


class Nested(nn.Module):
    """Writes into both leaves of a nest, one of them integers."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, rows):
        rows["n"] += 1
        return self.linear(rows["x"].mul_(rows["n"][:, None]))


EXPERTS = (ReluInPlace, AddInPlace, WriteColumns)


def written_out(layer):
    """The same layer with experts that write nothing: the answer."""
    plain = FMoE(
        E, D, top_k=2, gate=layer.gate, expert=[Written(expert) for expert in layer.experts]
    )
    plain.dispatcher = layer.dispatcher
    return plain


class Written(nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, rows):
        return self.expert.written_out(rows)


def named_alike(results):
    return {name.replace(".expert.", "."): value for name, value in results.items()}


@pytest.mark.parametrize("options", [{}, {"dispatch": Static(1.0)}, {"gate": SoftMoEGate}])
@pytest.mark.parametrize("expert", EXPERTS)
def test_values_and_gradients(expert, options, device):
    layer = FMoE(E, D, top_k=2, expert=expert, **options).to(device)
    x = torch.randn(T, D, device=device)
    before = x.clone()
    got = run(layer, layer.gate, x)
    want = run(written_out(layer), layer.gate, x)
    assert_same(got, named_alike(want))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), got["y"], rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)  # the rows are the experts' own, the tokens are not


@pytest.mark.parametrize(("backend", "counts"), [("aot_eager", (T, 5, 1, 0)), ("inductor", (T,))])
def test_compiled(backend, counts, fresh_dynamo):
    layer = FMoE(expert=[ReluInPlace, AddInPlace], d_model=D, top_k=2)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in counts:
        x = torch.randn(tokens, D)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        got = run(compiled, layer.gate, x)
        assert_same(got, run(layer, layer.gate, x), rtol=2e-5, atol=2e-6)


def test_leaves_of_a_nest():
    layer = FMoE(E, D, top_k=1, expert=Nested)
    x, n = torch.randn(T, D), torch.arange(T)
    ids, weights = layer.gate(x)
    want = torch.cat(
        [weights[t] * layer.experts[int(ids[t])].linear(x[t : t + 1] * (t + 1)) for t in range(T)]
    )
    torch.testing.assert_close(layer({"x": x, "n": n}), want)
    assert torch.equal(n, torch.arange(T))


def test_a_compiler_names_experts_that_fold_their_rows(fresh_dynamo, recwarn):
    class Attention(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.attention = nn.MultiheadAttention(d_model // 2, 2, batch_first=True)

        def forward(self, rows):
            pairs = rows.view(-1, 2, D // 2)
            return self.attention(pairs, pairs, pairs, need_weights=False)[0].flatten(1)

    def warnings_of(expert):
        layer = FMoE(2, D, top_k=1, expert=[nn.Linear(D, D), expert])
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(5, D)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), layer(x))
        return [str(w.message) for w in recwarn if "Inductor" in str(w.message)]

    assert warnings_of(nn.Linear(D, D)) == []
    (text,) = warnings_of(Attention(D))
    assert "MultiheadAttention in expert 1, which folds rows" in text


def test_an_activation_in_place_between_grouped_products():
    layers = [
        FMoETransformerMLP(E, D, 12, activation=nn.LeakyReLU(0.1, inplace=inplace))
        for inplace in (True, False)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(T, D)
    results = [run(layer, layer.gate, x) for layer in layers]
    assert_same(*results)


def test_statistics_are_those_of_the_experts_own_rows():
    layer = FMoE(2, D, top_k=1, expert=lambda d_model: nn.BatchNorm1d(d_model))
    with torch.no_grad():
        layer.gate.gate.weight.zero_()
        layer.gate.gate.bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.randn(T, D, dtype=torch.float32)
    y = layer(x)
    torch.testing.assert_close(y, (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())
    busy, idle = layer.experts
    torch.testing.assert_close(busy.running_mean, 0.1 * x.mean(0))
    assert torch.equal(idle.running_mean, torch.zeros(D))  # zero rows move nothing
    assert torch.equal(idle.running_var, torch.ones(D))
