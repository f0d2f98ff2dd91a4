"""Every layer with every gate under torch.compile, make_fx, torch.export and AOTInductor, equal to eager."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.fx.experimental._config as fx_config
from layer_cases import GATES, LAYERS, TOKENS, D, E, H, assert_same, make_layer, run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from cases import every_pair
from gate_classes import OwnGate
from host_syncs import no_host_syncs
from moeops import FMoE, FMoETransformerMLP
from moeops.gates import NaiveGate

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "same_random_numbers")

# The compiler's own C++ and Triton code adds in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture
def same_random_numbers():
    """Inductor draws what eager draws."""
    with torch._inductor.config.patch(fallback_random=True):
        yield


def graphs() -> int:
    """Graphs that Dynamo has compiled since the last reset of the counters, graph breaks included."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_counters(fresh_dynamo):
    counters.clear()
    return


# What Inductor makes of a gate does not depend on the experts: each of both meets it here and below, not all pairs.
@pytest.mark.parametrize(
    ("kind", "gate", "backend"),
    [
        *((kind, gate, "aot_eager") for kind in LAYERS for gate in GATES),
        ("mlp", "naive", "inductor"),
        ("composed", "switch", "inductor"),
        ("modules", "gshard", "inductor"),
    ],
)
def test_compiled_equals_eager(kind, gate, backend, device):
    layer = make_layer(kind, gate, device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):  # the second call meets the gate with or without a loss of the first
        x = torch.randn(11, D, device=device)
        assert_same(run(compiled, layer.gate, x), run(layer, layer.gate, x), **CLOSE)
    assert graphs() == 1
    assert not counters["graph_break"]


def unbacked(x):
    torch._dynamo.decorators.mark_unbacked(x, 0)
    return x


def check_all_tokens(layer, compiled, tokens, device, mark=lambda x: x):
    """Every token count runs in one graph and computes what eager does, gradients included."""
    for T in tokens:
        x = torch.randn(T, D, device=device)
        expected = run(layer, layer.gate, x)
        torch.manual_seed(7)
        leaf = mark(x.clone().requires_grad_())
        layer.zero_grad(set_to_none=True)
        y = compiled(leaf)
        loss = layer.gate.get_loss()
        total = y.square().sum() + (0 if loss is None else 0.5 * loss)
        total.backward()
        actual = {"y": y.detach(), "x": leaf.grad}
        if loss is not None:
            actual["loss"] = loss.detach()
        actual.update({name: p.grad for name, p in layer.named_parameters()})
        assert_same(actual, expected, **CLOSE)
        assert graphs() == 1, f"T = {T} compiled another graph"
    assert not counters["graph_break"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", LAYERS)
def test_marked_token_counts_share_one_graph(kind, gate, device):
    layer = make_layer(kind, gate, device)
    # Inductor once per gate, the cheaper backend for the rest: shapes are settled before either.
    backend = CompileCounterWithBackend("inductor" if kind == "mlp" else "aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    check_all_tokens(layer, compiled, TOKENS, device, unbacked)
    assert backend.frame_count == 1


@pytest.mark.parametrize(
    ("kind", "gate"),
    [*(("mlp", gate) for gate in GATES), ("composed", "switch"), ("modules", "gshard")],
)
def test_dynamic_token_counts_share_one_graph(kind, gate, device):
    layer = make_layer(kind, gate, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    # Torch makes extra graphs for sizes 0 and 1 of its own accord; this setting tells it not to.
    with fx_config.patch(backed_size_oblivious=True):
        check_all_tokens(layer, compiled, TOKENS, device)


@pytest.mark.parametrize("gate", GATES)
def test_dynamic_without_settings_needs_one_graph_from_two_tokens_on(gate, device):
    layer = make_layer("mlp", gate, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    check_all_tokens(layer, compiled, [T for T in TOKENS if T > 1], device)


def test_batches_of_sequences_with_dynamic_sizes():
    layer = make_layer("mlp", "gshard").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    # Not a sequence length of 0: such a tensor has other strides, which torch guards on.
    for shape in ((2, 5, D), (3, 4, D), (1, 7, D), (3, 1, D), (0, 4, D)):
        x = torch.randn(shape)
        expected = layer(x)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch._dynamo.decorators.mark_unbacked(x, 1)
        torch.testing.assert_close(compiled(x), expected)
    assert graphs() == 1


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", LAYERS)
def test_make_fx(kind, gate, device):
    layer = make_layer(kind, gate, device)
    params = dict(layer.named_parameters())

    def function(params, x):
        return torch.func.functional_call(layer, params, (x,))

    x = torch.randn(6, D, device=device)
    modes = ("real", "symbolic") if kind != "modules" else ("symbolic",)
    for mode in modes:
        graph = make_fx(function, tracing_mode=mode)(params, x)
        layer.gate.get_loss()
        for T in (6, 9) if mode == "symbolic" else (6,):
            x = torch.randn(T, D, device=device)
            torch.manual_seed(1)
            expected = layer(x)
            torch.manual_seed(1)
            torch.testing.assert_close(graph(params, x), expected)
        names = {str(node.target) for node in graph.graph.nodes}
        wanted = "moeops.moe_mlp.default" if kind == "mlp" else "moeops.unpermute_tokens.default"
        route = "moeops.topk_route" + ("" if gate == "naive" else "_balance") + ".default"
        assert {route, "moeops.sort_tokens.default", wanted} <= names


def export(layer, x, strict):
    tokens = torch.export.Dim("tokens", max=4096)
    return torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},), strict=strict)


@pytest.mark.parametrize(
    ("kind", "gate", "mode", "tracing"),
    every_pair(LAYERS, list(GATES), ["train", "eval"], ["strict", "non_strict"]),
)
def test_export(kind, gate, mode, tracing, device, tmp_path):
    layer = make_layer(kind, gate, device).train(mode == "train")
    program = export(layer, torch.randn(6, D, device=device), tracing == "strict")
    assert not layer.gate.has_loss
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for T in TOKENS:
        x = torch.randn(T, D, device=device)
        torch.manual_seed(2)
        expected = layer(x)
        torch.manual_seed(2)
        torch.testing.assert_close(loaded(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_aot_compile(kind):
    layer = make_layer(kind, "gshard").eval()
    x = torch.randn(6, D)
    forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
    if not hasattr(forward, "aot_compile"):
        pytest.skip(f"torch {torch.__version__} has no aot_compile of a compiled function")
    compiled = forward.aot_compile(((x,), {}))
    torch.testing.assert_close(compiled(layer, x), layer(x), **CLOSE)


class Regions(nn.Module):
    """Equal layers that are compiled once."""

    def __init__(self, kind, gate):
        super().__init__()
        self.layers = nn.ModuleList(make_layer(kind, gate) for _ in range(3))

    @torch.compiler.nested_compile_region
    def block(self, layer, x):
        return layer(x)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.block(layer, x)
        return x


@pytest.fixture
def nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["mlp", "composed"])
def test_nested_regions_that_torch_runs_on_uninitialised_memory(kind, nan_in_new_memory):
    model, x = Regions(kind, "naive"), torch.randn(6, D)
    y = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(y, model(x))
    with pytest.raises(RuntimeError, match="topk_route: logits must be finite"):
        model(x * float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "gate"), [("mlp", "switch"), ("composed", "naive"), ("modules", "gshard")]
)
def test_aot_inductor_package(kind, gate, device, tmp_path):
    layer = make_layer(kind, gate, device).eval()
    with torch.no_grad():
        program = export(layer, torch.randn(6, D, device=device), strict=True)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        for T in (6, 2, 33):
            x = torch.randn(T, D, device=device)
            torch.testing.assert_close(loaded(x), layer(x), **CLOSE)


class Block(nn.Module):
    """A residual block around a layer, checkpointed as models do it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        return x + checkpoint(self._mixture, x, use_reentrant=False)

    def _mixture(self, x):
        return self.layer(self.norm(x))


@pytest.mark.parametrize("gate", GATES)
def test_checkpoint_inside_a_compiled_function(gate):
    block = Block(make_layer("mlp", gate)).eval()
    x = torch.randn(6, D)
    expected = run(block, block.layer.gate, x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    # Torch asks for this where a checkpointed forward leaves something behind: here, the gate's loss.
    needed = gate != "naive"
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=needed):
        assert_same(run(compiled, block.layer.gate, x), expected)
    assert not block.layer.gate.has_loss
    assert graphs() == 1


def test_autocast_inside_and_outside_of_the_graph(device):
    layer = make_layer("mlp", "gshard", device).eval()
    x = torch.randn(12, D, device=device)

    def inside(x):
        with torch.autocast(device, torch.bfloat16):
            return layer(x)

    expected = inside(x)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(inside, fullgraph=True)(x), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), layer(x))


def test_masks_hooks_and_nests_compile():
    seen = []
    layer = make_layer(
        "mlp", "naive", mask_dict={1: 0.5}, gate_hook=lambda ids, w, _: seen.append(ids)
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 3, D), torch.tensor([[0, 1, 2], [0, 0, 1]])
    torch.testing.assert_close(compiled(x, mask), layer(x, mask))
    assert torch.equal(seen[0], seen[1])

    class Two(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.linear = nn.Linear(d_model, d_model)

        def forward(self, inp):
            return {"out": self.linear(inp["x"]), "scaled": inp["x"] * inp["scale"][:, None]}

    nested = FMoE(3, D, expert=Two)
    compiled = torch.compile(nested, fullgraph=True, backend="aot_eager")
    inp = {"x": torch.randn(6, D), "scale": torch.randn(6)}
    torch.testing.assert_close(compiled(inp), nested(inp))
    assert graphs() == 2


@pytest.mark.parametrize("kind", LAYERS)
def test_own_gate_in_plain_pytorch(kind, device):
    layer = make_layer(kind, OwnGate, device)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    check_all_tokens(layer, compiled, TOKENS, device, unbacked)
    assert backend.frame_count == 1
    x = torch.randn(6, D, device=device)
    torch.testing.assert_close(export(layer, x, strict=True).module()(x), layer(x))


def test_compiled_training_step_with_the_loss_inside():
    layer = make_layer("mlp", "switch")
    reference = copy.deepcopy(layer)

    def step(model, x):
        return model(x).square().mean() + 0.1 * model.gate.get_loss()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function, model in ((compiled, layer), (step, reference)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            function(model, torch.randn(16, D)).backward()
            optimizer.step()
    assert_same(dict(layer.state_dict()), dict(reference.state_dict()))
    assert not layer.gate.has_loss
    assert graphs() == 1


@pytest.mark.cuda
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["mlp", "composed"])
def test_reduce_overhead(kind, gate, cuda_device):
    layer = make_layer(kind, gate, cuda_device).eval()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    counters["inductor"].clear()
    for _ in range(4):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(64, D, device=cuda_device)
        expected = {name: v.clone() for name, v in run(layer, layer.gate, x).items()}
        assert_same(run(compiled, layer.gate, x), expected, **CLOSE)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.cuda
@pytest.mark.parametrize("gate", GATES)
def test_cuda_graph(gate, cuda_device):
    layer = make_layer("mlp", gate, cuda_device).eval()
    static_x = torch.randn(32, D, device=cuda_device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(static_x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static_y = layer(static_x)
        for _ in range(3):
            x = torch.randn(32, D, device=cuda_device)
            static_x.copy_(x)
            graph.replay()
            torch.testing.assert_close(static_y, layer(x))


@pytest.mark.cuda
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["mlp", "composed"])
def test_no_host_sync(kind, gate, cuda_device):
    layer = make_layer(kind, gate, cuda_device, mask_dict={1: 0.5})
    x = torch.randn(32, D, device=cuda_device, requires_grad=True)
    mask = torch.zeros(32, dtype=torch.int32, device=cuda_device)
    ones = torch.ones(32, D, device=cuda_device)
    layer(x, mask).backward(ones)  # first-call set-up may copy
    with no_host_syncs():
        y = layer(x, mask)
        loss = layer.gate.get_loss()
        if loss is not None:
            y = y + loss
        y.backward(ones)


def test_ready_gate_of_another_type_compiles():
    layer = FMoETransformerMLP(E, D, H, gate=NaiveGate(D, E, 1, 3))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, D)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_beyond_the_recompile_limit(kind):
    """Torch goes on in eager mode, or raises with ``fullgraph``; values, gradients and losses stay right."""
    layer = make_layer(kind, "gshard").eval()
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for tokens in (3, 5, 6, 9, 4):
            x = torch.randn(tokens, D)
            assert_same(run(compiled, layer.gate, x), run(layer, layer.gate, x))
        torch._dynamo.reset()
        whole = torch.compile(layer, backend="aot_eager", dynamic=False, fullgraph=True)
        for tokens in (3, 5):
            whole(torch.randn(tokens, D))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            whole(torch.randn(6, D))
