"""Programs written for FastMoE, on one rank. Several ranks: test_fmoe_ranks.py; files: test_fmoe_files.py."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import torch
from fmoe_cases import D, Expert, H, assert_same, by_hand, mlps
from torch import nn

import moeops
import moeops.integrations.fmoe as stand_in
from moeops.distributed import Exact, ShadowPolicy

T, E = 9, 4


MODULES = {
    "fmoe": "FMoE FMoELinear FMoETransformerMLP DistributedGroupedDataParallel",
    "fmoe.balance": "metrics reset_balance_profile update_balance_profile",
    "fmoe.distributed": "DistributedGroupedDataParallel",
    "fmoe.fastermoe.config": "float_from_env switch_from_env",
    "fmoe.fastermoe.shadow_policy": "get_shadow_policy global_policy no_shadow_policy",
    "fmoe.functions": "ensure_comm get_moe_group count_by_gate prepare_forward MOEScatter MOEGather AllGather Slice "
    "MOELinear _local_scatter _local_gather",
    "fmoe.gates": "ZeroGate NaiveGate NoisyGate GShardGate SwitchGate DCGate SwipeGate",
    "fmoe.gates.base_gate": "BaseGate",
    "fmoe.gates.faster_gate": "FasterGate gen_faster_gate",
    "fmoe.gates.naive_gate": "NaiveGate",
    "fmoe.gates.utils": "limit_by_capacity",
    "fmoe.layers": "FMoE FMoELinear mark_module_parallel_comm _fmoe_general_global_forward",
    "fmoe.linear": "MOELinear FMoELinear",
    "fmoe.megatron": "fmoefy",
    "fmoe.transformer": "_Expert FMoETransformerMLP",
    "fmoe.utils": "get_torch_default_comm get_rank_0_in_comm",
}


@pytest.mark.parametrize("module", MODULES)
def test_names(module, fmoe):
    found = importlib.import_module(module)
    for name in MODULES[module].split():
        assert getattr(found, name) is not None
    for part in module.split(".")[1:]:
        fmoe = getattr(fmoe, part)
    assert fmoe is found


@pytest.mark.parametrize("name", ["MegatronMLP", "save_checkpoint", "patch_forward_step"])
def test_megatron_is_one_clear_error(name, fmoe):
    with pytest.raises(ImportError, match=rf"fmoe\.megatron: {name} has no stand-in.*FMoETransfo"):
        exec(f"from fmoe.megatron import {name}")
    assert not hasattr(sys.modules["fmoe.megatron"], "another")


def test_what_has_no_stand_in_is_one_clear_error(fmoe):
    with pytest.raises(ImportError, match=r"fmoe_cuda: FastMoE's extension .*MOELinear"):
        importlib.import_module("fmoe_cuda")
    with pytest.raises(ImportError, match=r"MoEForward has no stand-in.*Exact\(n_chunks=2"):
        exec("from fmoe.fastermoe.schedule import MoEForward")


@pytest.mark.parametrize("name", ["fmoe", "fmoe_cuda"])
def test_fastmoe_itself_is_not_replaced(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(RuntimeError, match=rf"install: {name} must not be imported before"):
        stand_in.install()


def test_import_starts_nothing():
    program = (
        "import moeops, sys; assert 'moeops.integrations' not in sys.modules;"
        "import moeops.integrations.fmoe as f, torch; f.install(); import fmoe.gates.utils;"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_usage_of_the_first_readme(fmoe):
    """The MLP of a transformer is replaced, and data parallelism needs nothing more."""
    from fmoe import FMoETransformerMLP

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(D)
            self.mlp = FMoETransformerMLP(num_expert=E, d_model=D, d_hidden=H, top_k=2)

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    model = Block().double()
    x = torch.randn(2, T, D, dtype=torch.float64)
    rows = model.norm(x).reshape(-1, D)
    expected = x + by_hand(rows, *model.mlp.gate(rows), mlps(model.mlp)).view_as(x)
    assert_same(model(x), expected)
    assert_same(nn.DataParallel(model)(x), expected)
    losses = [m.get_loss() for m in model.modules() if isinstance(m, fmoe.gates.BaseGate)]
    assert torch.cat(losses).tolist() == [0]


def gate_args(layer):
    gate = layer.gate
    return layer.num_expert, layer.d_model, layer.world_size, layer.top_k, type(gate).__name__


def test_positional_arguments_of_both_versions(fmoe):
    from fmoe.gates import GShardGate

    mask = torch.tensor([0, 1] * 4 + [0])

    def hook(ids, scores, _):
        pass

    new = fmoe.FMoE(3, D, 1, None, None, None, 2, GShardGate, Expert, hook, mask, {1: 0.5}, False)
    old = fmoe.FMoE(3, D, 1, None, 2, GShardGate, Expert, hook, mask, {1: 0.5})
    assert gate_args(new) == gate_args(old) == (3, D, 1, 2, "GShardGate")
    assert new.gate_hook is old.gate_hook is hook
    assert new.mask_dict == old.mask_dict == {1: 0.5}
    assert new.gate.gate.bias is None
    assert old.gate.gate.bias is not None
    for args in ((E, D, H, nn.ReLU(), "dp", 1), (E, D, H, 1, None, nn.ReLU())):
        mlp = fmoe.FMoETransformerMLP(*args)
        assert (mlp.d_hidden, mlp.experts.fused_activation) == (H, "relu")
    with pytest.raises(TypeError, match=r"d_model must be given once"):
        fmoe.FMoE(3, D, d_model=D)
    with pytest.raises(TypeError, match=r"positional arguments must be .* got 14"):
        fmoe.FMoE(*[None] * 14)


class OneArgument(nn.Linear):
    """An expert as FastMoE 0.2 called it."""

    def __init__(self, d_model):
        super().__init__(d_model, d_model)


class Fused:
    """Builds a layer as FastMoE's users do: a subclass sets its experts."""

    def __new__(cls, num_expert=E, **options):
        from fmoe import FMoE
        from fmoe.transformer import _Expert

        class Layer(FMoE):
            def __init__(self):
                super().__init__(num_expert=num_expert, d_model=D, **options)
                self.experts = _Expert(num_expert, D, H, nn.ReLU())
                self.mark_parallel_comm("dp")

        return Layer()


def one_by_one(layer) -> list:
    """The experts of ``_Expert`` with ReLU, one function each."""
    up, down = layer.experts.htoh4, layer.experts.h4toh

    def expert(e):
        def run(row):
            hidden = torch.relu(row @ up.weight[e].T + up.bias[e])
            return hidden @ down.weight[e].T + down.bias[e]

        return run

    return [expert(e) for e in range(up.num_expert)]


KINDS = {
    "counted": (lambda fmoe, **o: fmoe.FMoE(E, D, expert=Expert, **o), None),
    "one_argument": (lambda fmoe, **o: fmoe.FMoE(E, D, expert=OneArgument, **o), None),
    "fused": (lambda fmoe, **o: Fused(**o), one_by_one),
    "mlp": (lambda fmoe, **o: fmoe.FMoETransformerMLP(E, D, H, **o), mlps),
    "different": (lambda fmoe, **o: fmoe.FMoE(d_model=D, expert=[Expert, OneArgument], **o), None),
}


def single(expert):
    counted = isinstance(expert, Expert)
    return lambda row: expert(row, torch.ones(1)) if counted else expert(row)


@pytest.mark.parametrize(
    ("dtype", "top_k"),
    [(torch.float64, 1), (torch.float64, 2), (torch.bfloat16, 2), (torch.float16, 2)],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_their_gates_say(kind, dtype, top_k, fmoe):
    build, functions = KINDS[kind]
    layer = build(fmoe, top_k=top_k).to(dtype)
    experts = functions(layer) if functions else [single(e) for e in layer.experts]
    x = torch.randn(T, D).to(dtype).requires_grad_()
    ids, scores = layer.gate(x)
    assert scores.dtype == dtype  # a loop over scores multiplies them with rows
    y = layer(x)
    expected = by_hand(x, ids, scores, experts)
    assert y.dtype == dtype
    assert_same(y, expected, dtype)
    if dtype == torch.float64:
        inputs = [x, *layer.parameters()]
        actual = torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True)
        wanted = torch.autograd.grad(expected.sin().sum(), inputs, allow_unused=True)
        for a, b, leaf in zip(actual, wanted, inputs, strict=True):
            zero = torch.zeros_like(leaf)
            assert_same(zero if a is None else a, zero if b is None else b)


@pytest.mark.parametrize("kind", ["counted", "fused", "mlp"])
def test_layers_compile(kind, fmoe, fresh_dynamo):
    layer = KINDS[kind][0](fmoe, gate=fmoe.gates.GShardGate)
    layer.gate.random_routing = False
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for num_tokens in (T, 5):
        x = torch.randn(num_tokens, D)
        assert_same(compiled(x), layer(x), torch.float32)


class Doubled:
    """Mixed into a layer: a user's own way to run experts."""

    def expert_fn(self, inp, fwd_expert_count):
        assert fwd_expert_count.dtype == torch.int64
        assert int(fwd_expert_count.sum()) == inp.shape[0]
        return 2 * super().expert_fn(inp, fwd_expert_count)


@pytest.mark.parametrize("kind", ["FMoE", "FMoETransformerMLP"])
def test_expert_fn_may_be_overridden(kind, fmoe):
    base = getattr(fmoe, kind)
    args = (E, D) if kind == "FMoE" else (E, D, H)
    options = {"expert": Expert} if kind == "FMoE" else {}
    gate = lambda *args: fmoe.gates.GShardGate(*args, capacity=(0.7, 0.7))  # noqa: E731
    layer = type("Layer", (Doubled, base), {})(*args, gate=gate, **options)
    plain = base(*args, gate=gate, **options)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, D)
    torch.manual_seed(1)
    expected = 2 * plain(x)
    torch.manual_seed(1)
    assert_same(layer(x), expected, torch.float32)
    if kind == "FMoE":
        rows = torch.randn(3, D)
        assert torch.equal(
            plain.expert_fn_single(rows, torch.tensor([3]), 1), plain.experts[1](rows, 3)
        )


class MultiGate(moeops.gates.BaseGate):
    """A user's gate that reads a nest."""

    def __init__(self, d_model, num_expert, world_size, top_k=2):
        super().__init__(num_expert, world_size)
        self.linear = nn.Linear(d_model, self.tot_expert)
        self.top_k = top_k

    def forward(self, inp):
        scores, ids = self.linear(inp["y"]).softmax(-1).topk(self.top_k)
        return ids, scores


class MultiExpert(nn.Linear):
    def __init__(self, d_model):
        super().__init__(d_model, d_model)

    def forward(self, inp, count):
        return {"out": super().forward(inp["y"]) * inp["x"], "number": inp["x"] + 1}


def test_several_inputs_and_outputs(fmoe):
    layer = fmoe.FMoE(num_expert=E, d_model=D, gate=MultiGate, expert=MultiExpert).double()
    inp = {"x": torch.randn(T, 1).double(), "y": torch.randn(T, D).double()}
    ids, scores = layer.gate(inp)
    out = layer(inp)
    expected = torch.stack(
        [
            sum(
                w * (layer.experts[e].weight @ inp["y"][t] + layer.experts[e].bias) * inp["x"][t]
                for e, w in zip(ids[t].tolist(), scores[t], strict=True)
            )
            for t in range(T)
        ]
    )
    assert_same(out["out"], expected)
    assert_same(out["number"], (inp["x"] + 1) * scores.sum(1, keepdim=True))


def test_linear_casts_its_input(fmoe):
    layer = fmoe.FMoELinear(3, D, H).bfloat16()
    counts = torch.tensor([4, 0, 5])
    x = torch.randn(9, D)
    assert torch.equal(layer(x, counts), layer(x.bfloat16(), counts))
    assert torch.equal(
        fmoe.linear.MOELinear.apply(x.bfloat16(), counts, layer.weight, layer.bias),
        layer(x, counts),
    )


@pytest.mark.parametrize("shape", [(T, 2), (T,), (0, 2)])
def test_functions_below_a_layer(shape, fmoe):
    from fmoe import functions as f

    gate = torch.randint(-1, E, shape)
    pos, local, received = f.count_by_gate(gate, E, 1)
    flat = gate.flatten()
    assert sorted(pos.tolist()) == [i for i, e in enumerate(flat.tolist()) if e >= 0]
    assert flat[pos].tolist() == sorted(e for e in flat.tolist() if e >= 0)
    counts = [int((flat == e).sum()) for e in range(E)]
    assert local.tolist() == received.tolist() == counts
    assert f.count_by_gate(gate, E, 1, require_pos=False)[0] is None

    pos, local, received, forward, rows = f.prepare_forward(gate, E, 1)
    assert forward.tolist() == counts
    assert rows == sum(counts)
    top_k = gate.shape[1] if gate.dim() == 2 else 1
    x = torch.randn(gate.shape[0], 3, requires_grad=True)
    sent = f.MOEScatter.apply(x, pos // top_k, local, received, rows, 1)
    assert torch.equal(sent, x[pos // top_k])
    back = f.MOEGather.apply(sent, pos, local, received, gate.numel(), 1)
    expected = x.repeat_interleave(top_k, 0) * (flat >= 0)[:, None]
    assert torch.equal(back, expected)
    grad = torch.randn_like(back)
    assert torch.equal(
        *(torch.autograd.grad(v, x, grad, retain_graph=True)[0] for v in (back, expected))
    )
    with pytest.raises(ValueError, match=r"fwd_batch_size must be the"):
        f.MOEScatter.apply(x, pos // top_k, local, received, rows + 1, 1)

    out = fmoe.layers._fmoe_general_global_forward(x, gate, lambda v, c: 2 * v, E, 1)
    assert torch.equal(out, 2 * expected)
    summed = f._local_gather(torch.ones(3, 2), torch.tensor([1, 1, 0]), 3)
    assert summed.tolist() == [[1, 1], [2, 2], [0, 0]]
    assert torch.equal(f._local_scatter(x, pos // top_k), sent)
    assert f.get_moe_group() is None


def test_capacity_is_shared_in_order(fmoe):
    from fmoe.gates.utils import limit_by_capacity

    ids = torch.tensor([[0, 1], [0, 2], [0, -1], [1, 0]])
    sent, received, kept = limit_by_capacity(ids, 3, 1, 2)
    assert kept.tolist() == [[0, 1], [0, 2], [-1, -1], [1, -1]]
    assert sent.tolist() == received.tolist() == [2, 2, 1]
    assert limit_by_capacity(ids.flatten(), 3, 1, 2)[2].tolist() == kept.flatten().tolist()


def test_gates_of_fastmoe_with_its_numbers(fmoe):
    """``compat`` reaches every gate, and changes shapes and kinds of noise as FastMoE has them."""
    x = torch.randn(T, D)
    stand_in.install(compat=True)
    assert fmoe.gates.GShardGate(D, E, 1).compat
    assert not fmoe.gates.GShardGate(D, E, 1, compat=False).compat
    switch = fmoe.gates.SwitchGate(D, E, 1, topk=1)
    assert (switch.jitter, switch.global_capacity, switch.compat) == ("logits", True, True)
    for gate in (fmoe.gates.ZeroGate(D, E, 1, 2), fmoe.gates.NoisyGate(D, E, 1, 2)):
        ids, scores = gate(x)
        assert (ids.shape, scores.shape) == ((2 * T,), (T, 1, 2))
        plain = type(gate)(D, E, 1, 2, compat=False)
        assert [tuple(v.shape) for v in plain(x)] == [(T, 2), (T, 2)]
        layer = fmoe.FMoE(E, D, gate=lambda *args, gate=gate: gate, expert=OneArgument)
        assert layer(x).shape == x.shape
    assert not fmoe.FMoETransformerMLP(E, D, H).experts.b_up.any()
    assert fmoe.FMoETransformerMLP(E, D, H, compat=False).experts.b_up.any()
    assert not fmoe.FMoELinear(E, D, H).bias.any()
    masked = {"expert": OneArgument, "mask": torch.ones(T)}
    layer = fmoe.FMoE(E, D, **masked)
    assert layer(x).ne(0).any()  # FastMoE ignores a mask without mask_dict
    assert not fmoe.FMoE(E, D, compat=False, **masked)(x).any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["NaiveGate", "GShardGate", "DCGate", "SwitchGate"])
def test_scores_of_compat_are_the_bits_of_torchs_softmax(name, compiled, fmoe, fresh_dynamo):
    gate = getattr(fmoe.gates, name)(D, 64, 1, compat=True).eval()
    gate.random_routing = False
    run = torch.compile(gate, backend="aot_eager", fullgraph=True) if compiled else gate
    x = torch.randn(500, D)
    _, scores = run(x)
    logits = gate.gate(x)
    top = logits.topk(gate.top_k).indices
    over_all, over_chosen = logits.softmax(-1).gather(1, top), logits.gather(1, top).softmax(-1)
    assert torch.equal(scores, over_all if name == "SwitchGate" else over_chosen)
    with torch.no_grad():
        ids, _ = type(gate)(D, 64, 1, compat=False).eval()(x)
    assert ids.shape == top.shape


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("name", [*MODULES["fmoe.gates"].split(), "factory"])
def test_every_gate_in_a_layer(name, compat, fmoe):
    """A layer builds gates as FastMoE's does, by class with a bias where they take one."""
    stand_in.install(compat=compat)
    gate = fmoe.gates.gen_faster_gate(0) if name == "factory" else getattr(fmoe.gates, name)
    layer = fmoe.FMoE(E, D, top_k=1 if name == "SwitchGate" else 2, gate=gate, expert=Expert)
    layer = layer.double().eval()
    layer.gate.random_routing = False
    x = torch.randn(T, D, dtype=torch.float64)
    ids, scores = layer.gate(x)
    ids, scores = ids.view(T, -1), scores.view(T, -1)
    assert_same(layer(x), by_hand(x, ids, scores, [single(e) for e in layer.experts]))
    losses = layer.gate.get_loss()
    assert (losses is None) == (name == "ZeroGate")


def test_options_of_faster_gate(fmoe, monkeypatch):
    from fmoe.gates.faster_gate import FasterGate, gen_faster_gate

    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "2")
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", "0.25")
    for gate in (FasterGate(D, 2, 4, 1), gen_faster_gate(3)(D, 2, 4)):
        assert (gate.node_rank, gate.gpus_per_node, gate.outgoing_fraction) == (1, 2, 0.25)
        assert gate(torch.randn(8, D))[1].dtype == torch.float32


def test_environment_chooses_the_dispatcher(monkeypatch):
    from moeops.integrations.fmoe.fastermoe import dispatch_from_environment, switch_from_env

    assert dispatch_from_environment(8) == {}
    monkeypatch.setenv("FMOE_FASTER_SHADOW_ENABLE", "1")
    assert dispatch_from_environment(8) == {}  # it needs the schedule
    monkeypatch.setenv("FMOE_FASTER_SCHEDULE_ENABLE", "ON")
    assert dispatch_from_environment(1) == {}
    monkeypatch.setenv("FMOE_FASTER_GLBPLC_NETBW", "1e9")
    monkeypatch.setenv("FMOE_FASTER_GLBPLC_GPUTP", "1e12")
    # Weights 2 * 100 * 300; a product is 2 operations per weight, a number 4 bytes.
    policy = ShadowPolicy(3 * 2 * 60000 / 1e12, 4 * 100 * 4 / 1e9, 60000 * 4 / 1e9)
    chosen = dispatch_from_environment(8, 100, 300)["dispatch"]
    assert chosen == Exact(n_chunks=2, shadowing=policy)
    monkeypatch.setenv("FMOE_FASTER_GROUP_SIZE", "2")
    assert dispatch_from_environment(8, 100, 300)["dispatch"].n_chunks == 4
    monkeypatch.setenv("FMOE_FASTER_GROUP_SIZE", "two")
    with pytest.raises(ValueError, match=r"FMOE_FASTER_GROUP_SIZE must be a number, got 'two'"):
        dispatch_from_environment(8)
    assert switch_from_env("FMOE_FASTER_SHADOW_ENABLE")
    monkeypatch.setenv("FMOE_FASTER_SHADOW_ENABLE", "0")
    assert not switch_from_env("FMOE_FASTER_SHADOW_ENABLE", True)


def test_balance_profile(fmoe):
    from fmoe.balance import metrics, reset_balance_profile, update_balance_profile

    profile = {}
    reset_balance_profile(profile, 2, "gshard")
    assert profile == {name: [None, None] for name in (*metrics, "gshard_loss")}
    logits = torch.zeros(4, 4)
    update_balance_profile(profile, torch.arange(4), None, logits, 1, 4, "gshard")
    assert [float(profile[name][1]) for name in profile] == [0, 1, 1, 1]
    update_balance_profile(profile, torch.tensor([0, 0, 0, 1]), None, logits, 0, 4, None)
    assert float(profile["Lmax-over-Lmean"][0]) == 3
    assert float(profile["Lmax-over-Lmin"][0]) == 4
    assert float(profile["coefficient-variation"][0]) == pytest.approx(2**0.5)
