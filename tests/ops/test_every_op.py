"""What every op of torch.ops.moeops must be able to do; an op without samples fails here."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import moeops
from samples import OP_CASES, SAMPLES, Sample, op_cases

BY_NAME = {sample.name: sample for sample in SAMPLES}
every_case = pytest.mark.parametrize(
    ("op", "index"),
    [(op, i) for op, builders in OP_CASES.items() for i in range(len(builders))],
    ids=[f"{op}_{i}" for op, builders in OP_CASES.items() for i in range(len(builders))],
)


def case_of(op, index, sample, dtype=torch.float32):
    if isinstance(sample, str):
        sample = BY_NAME[sample]
    return op_cases(op, sample, dtype)[index].with_grad()


def as_tuple(outputs):
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def outputs_and_gradients(function, inputs, seed=1):
    """Every output, and the gradient of every input that asks for one."""
    outputs = as_tuple(function(*inputs))
    moving = [o for o in outputs if o.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    assert bool(moving) == bool(wanted)
    if not moving:
        return list(outputs)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(o.shape, generator=generator).to(o) for o in moving]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(moving, wanted, directions)]


def assert_same(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride() or got.numel() <= 1


def test_every_registered_op_has_samples():
    registered = {
        name.removeprefix("moeops::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("moeops::")
    }
    # Composite ops, which graphs hold as what they are made of, exchanges, and some that tell the host something: see
    # exchange_checks.py, gather_checks.py, peer_checks.py, compile_checks.py, slice_checks.py, codec_checks.py and
    # schedule_checks.py in tests/distributed.
    exchanges = {"all_to_all_rows", "start_all_to_all_rows", "finish_all_to_all_rows"}
    exchanges |= {"average_gradient", "encode_rows", "decode_rows", "ep_region"}
    exchanges |= {"peer_all_gather", "peer_reduce_scatter"}
    tellers = {"check_order_", "report_lost_pairs", "require_common_size"}
    assert registered == set(OP_CASES) | exchanges | tellers


@every_case
@pytest.mark.parametrize("sample", ["dropped", "no_tokens", "strided", "few_rows"])
def test_opcheck(op, index, sample):
    case = case_of(op, index, sample)
    results = torch.library.opcheck(case.overload, case.positional, case.keywords)
    assert set(results.values()) == {"SUCCESS"}


@every_case
@pytest.mark.parametrize("sample", ["dropped", "no_tokens", "few_rows", "more_rows"])
def test_fake_has_the_shapes_types_and_strides_of_the_op(op, index, sample):
    case = case_of(op, index, sample)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in case.args]
    meta_case = replace(case, args=tuple(meta))
    for fake, real in zip(as_tuple(meta_case.run()), as_tuple(case.run()), strict=True):
        assert fake.shape == real.shape
        assert fake.dtype == real.dtype
        assert fake.stride() == real.stride()


@every_case
def test_inputs_are_left_alone(op, index):
    case = case_of(op, index, "dropped")
    before = [t.detach().clone() for t in case.inputs()]
    outputs_and_gradients(case.as_function(), case.inputs())
    for t, old in zip(case.inputs(), before, strict=True):
        assert torch.equal(t.detach(), old)
        assert t._version == 0


@every_case
@pytest.mark.parametrize("sample", ["dropped", "strided"])
def test_compile_with_inductor(op, index, sample, fresh_dynamo):
    case = case_of(op, index, sample)
    function = case.as_function()
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    assert_same(
        outputs_and_gradients(compiled, case.inputs()),
        outputs_and_gradients(function, case.inputs()),
    )


def token_counts(op, index, counts, rows_per_pair=None):
    samples = [Sample("dropped", T=T, dropped=0.2, rows_per_pair=rows_per_pair) for T in counts]
    return [case_of(op, index, sample) for sample in samples]


@every_case
def test_ten_token_counts_give_one_graph(op, index, fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    # Plans with fewer rows than pairs: a fake that took one number for the other would fail here.
    for case in token_counts(op, index, [13, 0, 1, 2, 3, 8, 21, 64, 100, 257], rows_per_pair=0.75):
        inputs = case.inputs()
        function = case.as_function()
        if compiled is None:
            compiled = torch.compile(function, fullgraph=True, backend=counter)
        for tensor, dim in zip(inputs, case.input_token_dims(), strict=True):
            if dim is not None:
                torch._dynamo.decorators.mark_unbacked(tensor, dim)
        assert_same(
            outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs)
        )
    assert counter.frame_count == 1


@every_case
@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_dynamic_token_counts_give_one_graph(op, index, how, fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for case in token_counts(op, index, [13, 2, 3, 5, 8, 21, 30, 64, 100, 257]):
        inputs = case.inputs()
        function = case.as_function()
        if compiled is None:
            compiled = torch.compile(
                function,
                fullgraph=True,
                backend=counter,
                dynamic=True if how == "dynamic" else None,
            )
        if how == "mark_dynamic":
            for tensor, dim in zip(inputs, case.input_token_dims(), strict=True):
                if dim is not None:
                    torch._dynamo.mark_dynamic(tensor, dim)
        assert_same(
            outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs)
        )
    assert counter.frame_count == 1


def targets(graph_module):
    return [n.target for n in graph_module.graph.nodes if n.op == "call_function"]


@every_case
def test_make_fx(op, index):
    case = case_of(op, index, "dropped")
    inputs = [t.detach() for t in case.inputs()]
    graph = make_fx(case.as_function(), tracing_mode="symbolic")(*inputs)
    assert targets(graph).count(case.overload) == 1
    assert_same(as_tuple(graph(*inputs)), as_tuple(case.as_function()(*inputs)))


@every_case
def test_symbolic_trace(op, index):
    case = case_of(op, index, "dropped")
    graph = torch.fx.symbolic_trace(case.as_function())
    assert targets(graph).count(case.overload) == 1
    assert_same(
        outputs_and_gradients(graph, case.inputs()),
        outputs_and_gradients(case.as_function(), case.inputs()),
    )


class OpModule(torch.nn.Module):
    """torch.export takes modules."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def dynamic_shapes(case):
    return tuple(
        {} if dim is None else {dim: torch.export.Dim.DYNAMIC} for dim in case.input_token_dims()
    )


@every_case
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_save_load(op, index, strict, fresh_dynamo):
    case, other = token_counts(op, index, [13, 29])
    with torch.no_grad():
        program = torch.export.export(
            OpModule(case.as_function()),
            tuple(case.inputs()),
            dynamic_shapes=(dynamic_shapes(case),),
            strict=strict,
        )
    assert targets(program.graph_module).count(case.overload) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for example in (case, other):
        with torch.no_grad():
            assert_same(
                as_tuple(loaded(*example.inputs())),
                as_tuple(example.as_function()(*example.inputs())),
            )


class Block(torch.nn.Module):
    """Router, sort, expert block."""

    def __init__(self, E=4, D=8, H=6, K=2):
        super().__init__()
        self.num_experts, self.top_k = E, K
        self.router = torch.nn.Linear(D, E)
        self.w_up = torch.nn.Parameter(torch.randn(E, 2 * H, D) * 0.3)
        self.w_down = torch.nn.Parameter(torch.randn(E, D, H) * 0.3)

    def forward(self, x):
        weights, ids = moeops.topk_route(self.router(x), self.top_k)
        plan = moeops.sort_tokens(ids, self.num_experts)
        return moeops.moe_mlp(x, plan, weights, self.w_up, self.w_down)


def test_aot_inductor_package(tmp_path, fresh_dynamo):
    block = Block().eval()
    x = torch.randn(13, 8)
    with torch.no_grad():
        program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("T")},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "block.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for T in (13, 2, 50):
            x = torch.randn(T, 8)
            torch.testing.assert_close(loaded(x), block(x))


def check_one_graph_for_ten_token_counts(block, backend):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for T in (13, 0, 1, 2, 3, 8, 21, 64, 100, 257):
        results = []
        for model in (compiled, block):
            x = torch.randn(T, 8, generator=torch.Generator().manual_seed(T)).requires_grad_()
            torch._dynamo.decorators.mark_unbacked(x, 0)
            y = model(x)
            loss = y.square().sum()
            results.append([y.detach(), *torch.autograd.grad(loss, (x, *block.parameters()))])
        assert_same(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_composed_block_is_one_graph_for_ten_token_counts(backend, fresh_dynamo):
    check_one_graph_for_ten_token_counts(Block(), backend)


class BudgetBlock(Block):
    """The same with a slot for every expert, of which a token uses some, and rows for those."""

    def forward(self, x):
        logits = self.router(x)
        experts = torch.arange(self.num_experts, device=x.device)
        ids = torch.where(logits > 0, experts, -1)  # [T, E]
        capacity = (x.shape[0] * self.top_k + self.num_experts - 1) // self.num_experts
        ids = moeops.limit_capacity(ids, self.num_experts, capacity)
        plan = moeops.sort_tokens(ids, self.num_experts, self.num_experts * capacity)
        return moeops.moe_mlp(x, plan, logits.sigmoid(), self.w_up, self.w_down)


def test_rows_by_capacity_are_one_graph_for_ten_token_counts(fresh_dynamo):
    check_one_graph_for_ten_token_counts(BudgetBlock(), "aot_eager")


def test_second_gradients_are_refused_where_there_is_none():
    sample = Sample("plain")
    for op in ("moe_mlp", "unpermute_tokens", "topk_route"):
        case = op_cases(op, sample, torch.float64)[0].with_grad()
        inputs = case.inputs()
        output = as_tuple(case.as_function()(*inputs))[0]
        leaves = [t for t in inputs if t.requires_grad]
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        with pytest.raises(
            NotImplementedError, match=rf"{op}_backward\w*: a gradient must be diff"
        ):
            torch.autograd.grad(grads[0].sum(), leaves)
