"""Checks of experts that are sharded by hidden unit, run by every rank of a group."""

from __future__ import annotations

import itertools
import math
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from layer_checks import DISPATCHES, HostReads
from parallel_cases import (
    ROUTINGS,
    D,
    K,
    TableGate,
    all_to_one,
    batch,
    loss_of,
    step,
    token_counts,
    uneven,
    with_record,
)
from sync_checks import STEPS, TOKENS, automatic, explicit, train
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moeops import FMoE, FMoETransformerMLP, Glu, LoadMonitor
from moeops.distributed import build_hierarchy, clip_grad_norm_, scale_expert_gradients
from moeops.gates import ExpertChoiceGate, Llama4Gate, SoftMoEGate, SwipeGate, SwitchGate
from moeops.layers import FusedExperts
from processes import Ranks

H = 8
LOCAL = 3  # experts of a rank; neither a multiple nor a divisor of the shards


def shard_counts(ranks: Ranks) -> list[int]:
    """Shards of an expert: two ranks of one or of two pairs, and all ranks."""
    return sorted({2, ranks.size})


def make(num_expert: int, ranks: Ranks, **options) -> FMoETransformerMLP:
    options = {"top_k": K, "gate": TableGate, "dtype": torch.float64, **options}
    options = {"activation": "swiglu", "device": ranks.device, **options}
    return FMoETransformerMLP(num_expert, D, H, **with_record(options))


def make_pair(ranks: Ranks, num_shards: int, **options) -> tuple[FMoE, FMoE]:
    """This rank's shards, and the whole layer on one rank, with the same parameters."""
    torch.manual_seed(1)
    names = ("gate", "top_k", "dtype", "mask_dict", "activation", "bias")
    shared = {name: options[name] for name in names if name in options}
    whole = make(LOCAL * ranks.size // num_shards, ranks, **shared)
    sizes = {"world_size": ranks.size, "expert_tensor_parallel_size": num_shards}
    part = make(LOCAL, ranks, **sizes, **options)
    assert part.tot_expert == whole.tot_expert == part.gate.tot_expert
    part.load_state_dict(share(whole.state_dict(), part, ranks.rank))
    return part, whole


def share(values: dict[str, Tensor], part: FMoE, rank: int) -> dict[str, Tensor]:
    """What of the whole layer's tensors belongs to a rank, spelt out."""
    num_shards = part.expert_tensor_parallel_size
    first = rank // num_shards * LOCAL
    shard = slice(rank % num_shards * H // num_shards, (rank % num_shards + 1) * H // num_shards)
    result = dict(values)
    for name, value in values.items():
        _, is_expert, short = name.partition("experts.")
        if not is_expert:
            continue
        value = value[first : first + LOCAL]
        if short in ("w_up", "b_up"):
            if getattr(part.experts.fused_activation, "interleaved", False):
                value = value.unflatten(1, (H, 2))[:, shard].flatten(1, 2)
            else:
                halves = value.split(H, 1)  # gate and up, or up alone
                value = torch.cat([half[:, shard] for half in halves], 1)
        elif short == "w_down":
            value = value[:, :, shard]
        elif short == "b_down":
            value = value.tensor_split(num_shards, 1)[rank % num_shards]
        result[name] = value
    return result


def assert_equal_results(part: FMoE, actual: dict, expected: dict, counts, ranks, note="") -> None:
    """Outputs of this rank's tokens, and gradients of this rank's parameters."""
    num_outputs = len(expected) - len(list(part.parameters()))
    names = list(expected)
    wanted = share({n: expected[n] for n in names[num_outputs:]}, part, ranks.rank)
    for name in names[:num_outputs]:
        wanted[name] = expected[name].split(counts)[ranks.rank]
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        if name.startswith("gate."):
            dist.all_reduce(actual[name])
        torch.testing.assert_close(
            actual[name], value, msg=lambda text, name=name: f"{note} {counts} {name}: {text}"
        )


def assert_equals_whole(layer, part, whole, ranks: Ranks, counts, routing=None, note="") -> None:
    """One step on the parts of a batch against the same step of the whole layer on all of it."""
    x = batch(sum(counts), ranks.device)
    actual = step(layer, part, "mlp", x.split(counts)[ranks.rank], routing)
    expected = step(whole, whole, "mlp", x, routing)
    assert_equal_results(part, actual, expected, counts, ranks, note)


def assert_equals_whole_on_own_tokens(ranks: Ranks, part: FMoE, local: FMoE, routing=None) -> None:
    """Each rank has another batch; ``local`` computes this rank's with all experts."""
    x = batch(7, ranks.device)
    x[:, 1:] += ranks.rank
    actual = step(part, part, "mlp", x, routing)
    expected = step(local, local, "mlp", x, routing)
    for name, value in expected.items():
        if name.startswith("experts."):
            dist.all_reduce(value)
    for name, value in share(expected, part, ranks.rank).items():
        torch.testing.assert_close(actual[name], value, msg=lambda t, n=name: f"{n}: {t}")


def check_equals_one_rank(ranks: Ranks) -> None:
    counts = token_counts(ranks.size).values()
    cases = list(itertools.product(shard_counts(ranks), DISPATCHES))
    for num_shards, options in cases if ranks.size == 2 else cases[::4] + cases[3::4]:
        part, whole = make_pair(ranks, num_shards, **options)
        for these, routing in itertools.product(counts, ROUTINGS):
            note = f"{num_shards} shards, {options}, {routing.__name__}"
            assert_equals_whole(part, part, whole, ranks, these, routing, note)


def check_activations(ranks: Ranks) -> None:
    """All that work on single units, and gated ones with options; swiglu is everywhere else."""
    units = (Glu("gelu_tanh", limit=0.7), Glu(alpha=1.702, limit=0.7, offset=1.0, interleaved=True))
    kinds = ("relu", nn.GELU(), "silu", "relu_squared", *units)
    for activation, bias in itertools.product(kinds, (0, 1)):
        part, whole = make_pair(ranks, 2, activation=activation, bias=bool(bias))
        assert_equals_whole(part, part, whole, ranks, [5] * ranks.size, uneven)


def check_all_kinds_of_routing(ranks: Ranks) -> None:
    """Slots, weights on inputs, fewer rows than pairs: each rank routes its own tokens."""
    soft = {"gate": partial(SoftMoEGate, num_slots=2), "top_k": 1}
    for num_shards, options in itertools.product(
        shard_counts(ranks), ({"gate": Llama4Gate}, {"gate": ExpertChoiceGate}, soft)
    ):
        gather = [] if options is soft else [{"dispatch": "gather", "rows": float(ranks.size)}]
        for dispatch in (DISPATCHES[0], DISPATCHES[3], *gather):
            part, whole = make_pair(ranks, num_shards, **options, **dispatch)
            assert_equals_whole_on_own_tokens(ranks, part, whole)


def check_static_drops_what_one_rank_drops(ranks: Ranks) -> None:
    """Rows per expert, or a factor on T * K / E, with the number of whole experts."""
    for capacity, num_shards in itertools.product((1, 2, 0.5, 1.25), shard_counts(ranks)):
        options = {"dispatch": "static", "capacity": capacity}
        part, whole = make_pair(ranks, num_shards, **options)
        local = make(whole.num_expert, ranks, **options)
        local.load_state_dict(whole.state_dict())
        assert part.dispatcher.inner.capacity_of(7 * K * num_shards) == (
            local.dispatcher.capacity_of(7 * K)
        )
        for routing in (uneven, all_to_one):
            assert_equals_whole_on_own_tokens(ranks, part, local, routing)


def check_gates_masks_hooks_and_monitors_see_whole_experts(ranks: Ranks) -> None:
    part, whole = make_pair(ranks, 2, mask_dict={1: 2.0})
    seen = []
    part.gate_hook = lambda ids, weights, _: seen.append((ids, weights))
    monitors = LoadMonitor(part), LoadMonitor(whole)
    x = batch(6, ranks.device)
    mask = torch.tensor([0, 1, 0, 2, 0, 1], device=ranks.device)
    torch.testing.assert_close(part(x, mask), whole(x, mask))
    assert seen[0][0].shape == seen[0][1].shape == (6, K)
    mine, wanted = (monitor.summary()[""] for monitor in monitors)
    assert mine.loads.tolist() == wanted.loads.tolist()
    assert len(mine.loads) == part.tot_expert


def check_gates_that_count_the_tokens_of_all_ranks(ranks: Ranks) -> None:
    """One capacity, or one balance, for all ranks' tokens, whether or not each rank holds a part of all experts."""
    options = {"switch_eps": 0.0, "capacity": 0.5, "global_capacity": True}
    for num_shards in shard_counts(ranks):
        gate = partial(SwitchGate, **options)
        part, whole = make_pair(ranks, num_shards, gate=gate, top_k=1)
        assert_equals_whole(part, part, whole, ranks, [6] * ranks.size)
        # Swipe balances ranks that hold different experts; with one of them there is nothing to balance.
        part, whole = make_pair(ranks, num_shards, gate=SwipeGate, top_k=2)
        x = batch(6 * ranks.size, ranks.device)
        y, ids = part(x.split(6)[ranks.rank]), part.gate(x.split(6)[ranks.rank])[0]
        if num_shards == ranks.size:
            torch.testing.assert_close(y, whole(x).split(6)[ranks.rank])
        every = [torch.empty_like(ids) for _ in range(ranks.size)]
        dist.all_gather(every, ids)
        loads = (torch.cat(every) // LOCAL).flatten().bincount(minlength=ranks.size // num_shards)
        assert int(loads.max()) == 6 * 2 * num_shards


def check_slices(ranks: Ranks) -> None:
    """Ranks with the same tokens, remainder included."""
    part, whole = make_pair(ranks, 2, slice_group=dist.group.WORLD)
    for num_tokens in (4 * ranks.size + 1, 1, 0):
        x = batch(num_tokens, ranks.device)
        actual = step(part, part, "mlp", x, uneven)
        expected = share(step(whole, whole, "mlp", x, uneven), part, ranks.rank)
        for name, value in expected.items():
            if name.startswith("gate."):
                dist.all_reduce(actual[name])
            if name.startswith(("gate.", "experts.")):
                actual[name] /= ranks.size
            torch.testing.assert_close(actual[name], value, msg=lambda t, n=name: f"{n}: {t}")


def check_stages(ranks: Ranks) -> None:
    """An exchange in stages, the shards of an expert on one node and on several."""
    hierarchy = build_hierarchy(dist.group.WORLD, max(1, ranks.size // 2))
    for num_shards in shard_counts(ranks):
        part, whole = make_pair(ranks, num_shards, hierarchy=hierarchy)
        assert_equals_whole(part, part, whole, ranks, [5] * ranks.size, uneven)


def check_host_copies(ranks: Ranks) -> None:
    for options in DISPATCHES:
        part, _ = make_pair(ranks, 2, **options)
        x = batch(6, ranks.device).requires_grad_()
        with HostReads() as reads:
            loss_of(part(x)).backward()
        assert reads.names == (["cpu", "tolist"] if options["dispatch"] == "exact" else [])


def check_compiled(ranks: Ranks) -> None:
    """One graph for any number of tokens that equals one rank, with the same collectives on every rank."""
    torch._dynamo.reset()
    static = {"dispatch": "static", "capacity": 12, "n_chunks": 2}
    backend, options = ("inductor", {}) if ranks.size == 2 else ("aot_eager", static)
    part, whole = make_pair(ranks, 2, **options)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(part, fullgraph=True, backend=counter)

    def run(x):
        torch._dynamo.decorators.mark_unbacked(x, 0)
        return compiled(x)

    def try_all():
        for counts, routing in itertools.product(token_counts(ranks.size).values(), ROUTINGS):
            assert_equals_whole(run, part, whole, ranks, counts, routing, backend)

    _, codes = run_and_get_code(try_all)
    assert counter.frame_count == 1
    if backend == "inductor":
        assert_same_collectives(codes, ranks)


def check_compiled_slots(ranks: Ranks) -> None:
    if ranks.size > 2:
        return
    torch._dynamo.reset()
    part, whole = make_pair(ranks, 2, gate=partial(SoftMoEGate, num_slots=2), top_k=1)
    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    x = batch(6, ranks.device)
    torch.testing.assert_close(compiled(x), whole(x))


def assert_same_collectives(codes: list[str], ranks: Ranks) -> None:
    """Every rank starts the same collectives in the same order, for counts, tokens, choices and sums."""
    calls = [re.findall(r"torch\.ops\._c10d_functional\.(\w+)\.default\(", code) for code in codes]
    assert [graph.count("all_to_all_single") for graph in calls] == [4, 3], calls
    assert {name for graph in calls for name in graph} == {"all_to_all_single", "wait_tensor"}
    every: list = [None] * ranks.size
    dist.all_gather_object(every, calls)
    assert all(other == calls for other in every)


class Model(nn.Module):
    """A layer behind another one."""

    def __init__(self, moe: FMoE, ranks: Ranks):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Linear(D, D, dtype=torch.float64, device=ranks.device)
        self.moe = moe

    def forward(self, x):
        tokens = torch.cat((x[:, :1], self.first(x)[:, 1:]), 1)
        return tokens + self.moe(tokens)


def check_trains_like_one_rank(ranks: Ranks) -> None:
    """Three steps with clipped gradients: averaged, divided by all ranks, and every shard counted once."""
    x = batch(TOKENS * ranks.size, ranks.device)
    for num_shards, wrap in itertools.product(shard_counts(ranks), (explicit, automatic)):
        part, whole = (Model(moe, ranks) for moe in make_pair(ranks, num_shards))
        norms = train(whole, whole, x)
        model, after = wrap(part)
        actual = train(model, part, x.split(TOKENS)[ranks.rank], after=after)
        assert len(norms) == STEPS
        assert norms.min() > 0.05  # so that clipping did something
        torch.testing.assert_close(actual, norms)
        assert_same_parameters(part, whole, ranks, lambda parameter: parameter)
    for norm_type in (1.0, math.inf):
        part, whole = (Model(moe, ranks) for moe in make_pair(ranks, 2))
        wrapped, after = explicit(part)
        loss_of(wrapped(x.split(TOKENS)[ranks.rank])).backward()
        after()
        (loss_of(whole(x)) / ranks.size).backward()
        expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.01, norm_type)
        torch.testing.assert_close(clip_grad_norm_(part, 0.01, norm_type), expected)


def assert_same_parameters(part: Model, whole: Model, ranks: Ranks, full) -> None:
    wanted = share(dict(whole.named_parameters()), part.moe, ranks.rank)
    for name, parameter in part.named_parameters():
        torch.testing.assert_close(
            full(parameter), wanted[name], msg=lambda text, name=name: f"{name}: {text}"
        )


def check_fully_sharded(ranks: Ranks) -> None:
    """FSDP2 over the copies of sharded experts, and over all ranks for the rest."""
    if ranks.size != 4:
        return
    kind = ranks.device.partition(":")[0]
    mesh = init_device_mesh(kind, (2, 2), mesh_dim_names=("data", "experts"))
    pair = Ranks(ranks.rank % 2, 2, ranks.device)
    moe, whole_moe = make_pair(pair, 2, moe_group=mesh.get_group("experts"))
    part, whole = Model(moe, ranks), Model(whole_moe, ranks)
    fully_shard(part.moe.experts, mesh=mesh["data"])
    fully_shard(part, mesh=init_device_mesh(kind, (4,)))
    scale_expert_gradients(part)
    x = batch(TOKENS * ranks.size, ranks.device)
    norms = train(whole, whole, x)
    torch.testing.assert_close(train(part, part, x.split(TOKENS)[ranks.rank]), norms)
    assert_same_parameters(part, whole, pair, lambda parameter: parameter.full_tensor())
    # Drawn anew: the same shard of the same experts as without FSDP2.
    torch.manual_seed(9)
    part.moe.experts.reset_parameters()
    torch.manual_seed(9)
    plain = FusedExperts(
        LOCAL, D, H, num_shards=2, shard=pair.rank, dtype=torch.float64, device=ranks.device
    )
    for name, parameter in part.moe.experts.named_parameters():
        assert torch.equal(parameter.full_tensor(), getattr(plain, name)), name


def check_arguments(ranks: Ranks) -> None:
    """What does not fit is one error on every rank, and the ranks still work together afterwards."""
    last = ranks.rank == ranks.size - 1
    sizes = {"world_size": ranks.size}
    name = "expert_tensor_parallel_size"
    cases = [
        ({name: 3}, f"{name} must be a divisor of the {ranks.size} ranks .* got 3"),
        ({name: 0}, f"{name} must be at least 1, got 0"),
        ({name: 1 + last}, f"{name} must be the same on every rank|a gate for|must choose among"),
        ({name: 2, "activation": torch.tanh}, "activation must be one of .* may mix hidden units"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            make(LOCAL, ranks, **sizes, **options)
    with pytest.raises(ValueError, match=r"d_hidden must be a multiple of the 2 shards .* got 7"):
        FMoETransformerMLP(LOCAL, D, 7, **sizes, **{name: 2})
    with pytest.raises(ValueError, match=r"d_model must be at least the 2 shards .* got 1"):
        FMoETransformerMLP(LOCAL, 1, H, **sizes, **{name: 2})
    with pytest.raises(ValueError, match="d_hidden must be the same on every rank"):
        FMoETransformerMLP(LOCAL, D, 4 + 4 * last, **sizes, **{name: 2})
    kind, message = (
        (ValueError, "d_hidden must be at") if last else (RuntimeError, "an error on rank")
    )
    with pytest.raises(kind, match=message):
        FMoETransformerMLP(LOCAL, D, 0 if last else 4, **sizes)
    with pytest.raises(ValueError, match=f"{name} must be 1 where expert is given, got 2"):
        FMoE(LOCAL, D, expert=lambda d_model: nn.Linear(d_model, 3), **sizes, **{name: 2})
    part, whole = make_pair(ranks, 2)
    x = batch(4, ranks.device)
    torch.testing.assert_close(part(x), whole(x))
    assert f"{name}=2" in repr(part)
    assert f"shard={ranks.rank % 2} of 2" in repr(part)
