"""HashGate: tables, keys, and how token ids reach it."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from gate_checks import D, E, assert_same, check_checkpoint, check_compile, check_export, step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from cases import each
from moeops import FMoE, FMoETransformerMLP
from moeops.gates import HashGate, token_ids


@pytest.mark.parametrize(
    ("buckets", "experts", "k"), [(100, 6, 1), (64, 6, 3), (7, 7, 7), (3, 8, 2)]
)
def test_table_is_even_and_without_repetitions(buckets, experts, k):
    table = HashGate(D, experts, 1, k, num_buckets=buckets).table
    assert table.shape == (buckets, k)
    for column in table.t():
        counts = column.bincount(minlength=experts)
        assert int(counts.max()) - int(counts.min()) <= 1
    assert all(len(set(row)) == k for row in table.tolist())


def test_table_depends_on_the_seed_only():
    torch.manual_seed(1)
    one = HashGate(D, 6, num_buckets=100)
    torch.manual_seed(2)
    assert torch.equal(one.table, HashGate(D, 6, num_buckets=100).table)
    assert not torch.equal(one.table, HashGate(D, 6, num_buckets=100, seed=1).table)
    with torch.device("meta"):
        other = HashGate(D, 6, num_buckets=100)
    other = other.to_empty(device="cpu")
    other.reset_parameters()
    assert torch.equal(one.table, other.table)


def test_table_is_saved():
    one, other = HashGate(D, 6, num_buckets=50), HashGate(D, 6, num_buckets=50, seed=3)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.table, other.table)


def test_balanced_table():
    """Greedy: the heaviest load is at most the mean plus the weight of one id (Graham's bound)."""
    counts = (10_000 / torch.arange(1, 301)).long()[torch.randperm(300)]  # Zipf
    gate = HashGate(D, 6, 1, 2, num_buckets=300, frequencies=counts)
    loads = torch.zeros(6).index_add_(0, gate.table.view(-1), counts.repeat_interleave(2).float())
    assert float(loads.max()) <= float(loads.sum()) / 6 + int(counts.max())
    plain = HashGate(D, 6, 1, 2, num_buckets=300)
    other = torch.zeros(6).index_add_(0, plain.table.view(-1), counts.repeat_interleave(2).float())
    assert float(loads.max()) < float(other.max())
    assert all(len(set(row)) == 2 for row in gate.table.tolist())


def test_token_key(device):
    gate = HashGate(D, 6, 1, 2, num_buckets=100).to(device)
    x = torch.randn(4, D, device=device)
    ids = torch.tensor([[5, 99], [5, 0]], dtype=torch.int32, device=device)
    with token_ids(gate, ids):
        topk_ids, weights = gate(x)
    assert torch.equal(topk_ids, gate.table[ids.view(-1).long()])
    assert torch.equal(weights, torch.full((4, 2), 0.5, device=device))
    assert torch.equal(gate(x, ids)[0], topk_ids)
    assert gate(x.double(), ids)[1].dtype == torch.float64
    assert gate(x.bfloat16(), ids)[1].dtype == torch.float32
    assert not gate.has_loss


def test_large_ids_are_spread_over_the_buckets():
    """Of n ids in b buckets a count is about Poisson: 6 sigma above the mean is seen once in a billion buckets."""
    gate = HashGate(D, 4, num_buckets=64)
    for ids in (torch.arange(64, 64 + 64_000), torch.arange(0, 64 * 64_000, 64) + 64):
        counts = gate._buckets(torch.empty(len(ids), D), ids).bincount(minlength=64)
        assert float((counts - 1000).abs().max()) < 6 * 1000**0.5


def test_position_key(device):
    gate = HashGate(D, 6, 1, 2, key="position", num_buckets=50, sequence_length=5).to(device)
    ids, _ = gate(torch.randn(12, D, device=device))
    assert torch.equal(ids, gate.table[torch.arange(12, device=device) % 5])
    gate.sequence_length = None
    assert torch.equal(gate(torch.randn(12, D, device=device))[0], gate.table[:12])


def test_feature_key(dtype, device):
    gate = HashGate(D, 6, 1, 2, key="feature", num_buckets=16).to(device, dtype)
    x = torch.randn(40, D, device=device).to(dtype)
    rows = x.cpu().double() @ gate.projections.cpu().double().t()
    want = [sum(2**i for i, value in enumerate(row) if value > 0) for row in rows.tolist()]
    ids, _ = gate(x)
    assert torch.equal(ids.cpu(), gate.table.cpu()[want])
    assert len(set(want)) > 8
    # Only directions count, and close tokens meet.
    assert torch.equal(gate(2 * x)[0], ids)


def test_own_table():
    gate = HashGate(D, 3, 1, 2, num_buckets=2)
    gate.set_table(torch.tensor([[2, 0], [1, 2]]))
    assert gate(torch.randn(3, D), torch.tensor([1, 0, 1]))[0].tolist() == [[1, 2], [2, 0], [1, 2]]
    for table, match in (
        (
            [[3, 0], [1, 2]],
            r"set_table: table must hold experts in \[0, 3\), got values from 0 to 3",
        ),
        ([[1, 1], [1, 2]], r"set_table: table must name different experts"),
        ([[1, 0]], r"set_table: table must have size 2 in dimension 0"),
    ):
        with pytest.raises(ValueError, match=match):
            gate.set_table(torch.tensor(table))


class Model(nn.Module):
    """Embedding and two layers with hash gates; the second one may be checkpointed."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.layers = nn.ModuleList(
            FMoETransformerMLP(E, D, 12, top_k=2, gate=partial(HashGate, num_buckets=50, seed=i))
            for i in range(2)
        )
        self.checkpointed = checkpointed

    def run(self, x, ids):
        with token_ids(self, ids):
            return self.layers[1](self.layers[0](x))

    def forward(self, ids):
        x = self.embed(ids)
        if self.checkpointed == "inside":
            return checkpoint(self.run, x, ids, use_reentrant=False)
        if self.checkpointed == "outside":
            with token_ids(self, ids):
                return checkpoint(self.layers[0], x, use_reentrant=False)
        return self.run(x, ids)


def gradients(model, module, ids):
    model.zero_grad(set_to_none=True)
    y = module(ids)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def test_token_ids_reach_every_gate_and_leave_again(device):
    model = Model().to(device)
    ids = torch.randint(50, (3, 7), device=device)
    hits = []
    for layer in model.layers:
        layer.gate.register_forward_hook(lambda gate, _, out: hits.append((gate, out[0])))
    model(ids)
    assert [gate for gate, _ in hits] == [layer.gate for layer in model.layers]
    assert all(torch.equal(out, gate.table[ids.view(-1)]) for gate, out in hits)
    assert all(layer.gate._token_ids is None for layer in model.layers)
    with pytest.raises(ValueError, match=r"HashGate: token_ids must be given"):
        model.layers[0](model.embed(ids))


def test_contexts_nest_and_survive_errors():
    gate, x = HashGate(D, 6, num_buckets=50), torch.randn(3, D)
    outer, inner = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    with token_ids(gate, outer):
        with token_ids(gate, inner):
            assert torch.equal(gate(x)[0], gate.table[inner])
        with pytest.raises(ValueError, match="x must have size"), token_ids(gate, inner):
            gate(x[:, 1:])
        assert torch.equal(gate(x)[0], gate.table[outer])
        assert copy.deepcopy(gate)._token_ids is None
        assert pickle.loads(pickle.dumps(gate))._token_ids is None
    assert gate._token_ids is None


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_model_with_token_ids_compiles(backend, device):
    torch._dynamo.reset()
    model = Model().to(device)
    other = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T in (5, 6, 17, 1, 0):
        ids = torch.randint(50, (T,), device=device)
        want = gradients(other, other, ids)
        torch._dynamo.decorators.mark_unbacked(ids, 0)
        for got, expected in zip(gradients(model, compiled, ids), want, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
    assert all(layer.gate._token_ids is None for layer in model.layers)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_model_with_token_ids_exports(strict, device):
    model = Model().to(device)
    shapes = ({0: torch.export.Dim("tokens", max=4096)},)
    ids = torch.randint(50, (6,), device=device)
    program = torch.export.export(model, (ids,), dynamic_shapes=shapes, strict=strict).module()
    for T in (6, 3, 40):
        ids = torch.randint(50, (T,), device=device)
        torch.testing.assert_close(program(ids), model(ids))


def test_checkpoint_recomputes_with_the_same_ids():
    model, plain = Model("inside"), Model()
    plain.load_state_dict(model.state_dict())
    first, second = torch.randint(50, (2, 9)).unbind()
    # Two forwards before the backwards, as in a pipeline.
    losses = [model(ids).square().sum() for ids in (first, second)]
    sum(losses).backward()
    sum(plain(ids).square().sum() for ids in (first, second)).backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_checkpoint_outside_of_the_context_is_an_error():
    y = Model("outside")(torch.randint(50, (9,)))
    with pytest.raises(ValueError, match=r"must stand inside of a checkpointed function"):
        y.sum().backward()


def test_fmoe_takes_it(device):
    layer = FMoE(
        E, D, top_k=2, gate=partial(HashGate, num_buckets=50), expert=lambda d: nn.Linear(d, d)
    )
    layer = layer.to(device)
    x, ids = torch.randn(5, D, device=device), torch.randint(50, (5,), device=device)
    with token_ids(layer, ids):
        y = layer(x)
    table = layer.gate.table[ids]
    want = [sum(layer.experts[e](x[t]) for e in row) / 2 for t, row in enumerate(table.tolist())]
    torch.testing.assert_close(y, torch.stack(want))


POSITION = partial(HashGate, key="position", num_buckets=64, sequence_length=4)
FEATURE = partial(HashGate, key="feature", num_buckets=16)


@pytest.mark.parametrize(
    ("build", "backend"),
    [(POSITION, "inductor"), (FEATURE, "aot_eager")],
    ids=["position", "feature"],
)
def test_compile(build, backend, device):
    check_compile(build, device, backend)


def test_export(device):
    check_export(POSITION, device, strict=False, training=True)
    check_export(FEATURE, device, strict=False, training=False)


def test_checkpoint():
    check_checkpoint(POSITION, compile_it=False)


@pytest.mark.parametrize("key", ["token", "position", "feature"])
def test_no_tokens(key, device):
    gate = HashGate(D, E, 1, 2, key=key, num_buckets=16).to(device)
    ids, weights = gate(
        torch.randn(0, D, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    )
    assert ids.shape == weights.shape == (0, 2)


def test_experts_learn():
    layer = FMoETransformerMLP(E, D, 12, activation="swiglu", top_k=2, gate=POSITION)
    x = torch.randn(8, D)
    assert_same(step(layer, layer, x), step(layer, layer, x))
    assert bool(layer.experts.w_down.grad.abs().sum() > 0)


@each(
    ("call", "error", "match"),
    [
        (lambda: HashGate(D, 4, 1, 5), ValueError, r"HashGate: top_k must be at most .* got 5"),
        (lambda: HashGate(D, 4, key="x"), ValueError, r"HashGate: key must be one of .* got 'x'"),
        (
            lambda: HashGate(D, 4, num_buckets=0),
            ValueError,
            r"num_buckets must be at least 1, got 0",
        ),
        (
            lambda: HashGate(D, 4, key="feature", num_buckets=12),
            ValueError,
            r"num_buckets must be a power of 2 .* got 12",
        ),
        (
            lambda: HashGate(D, 4, key="position", frequencies=torch.ones(3), num_buckets=3),
            ValueError,
            r"frequencies must be None for key='position'",
        ),
        (
            lambda: HashGate(D, 4, frequencies=torch.ones(3), num_buckets=4),
            ValueError,
            r"frequencies must have size 4",
        ),
        (
            lambda: HashGate(D, 4, frequencies=-torch.ones(3), num_buckets=3),
            ValueError,
            r"frequencies must be at least 0, got -1",
        ),
        (
            lambda: HashGate(D, 4)(torch.randn(3, D), torch.arange(4)),
            ValueError,
            r"token_ids must hold one id for each of the 3 tokens, got torch.int64 \[4\]",
        ),
        (
            lambda: HashGate(D, 4)(torch.randn(3, D), torch.randn(3)),
            TypeError,
            r"HashGate: token_ids must be int32 or int64",
        ),
        (lambda: token_ids(3, torch.arange(4)), TypeError, r"token_ids: module must be"),
        (lambda: token_ids(nn.Linear(1, 1), [1]), TypeError, r"token_ids: ids must be a tensor"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
