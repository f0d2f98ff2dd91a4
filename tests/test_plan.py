"""python -m moeops plan and profile: volumes and bytes by hand and as counted, choices, and errors."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moeops
from benchmarks import plan_check
from moeops.__main__ import main
from moeops.comm import RankGroup
from moeops.cost.laws import (
    BytesLaw,
    Direction,
    ExpertLaw,
    HostCost,
    HostLaw,
    LinkLaw,
    RouterLaw,
)
from moeops.cost.schedule import MlpSizes, schedule_of
from moeops.dispatch.base import ExpertRanks
from moeops.dispatch.gather import Gather, GatherDispatcher
from moeops.dispatch.options import Exact, Static
from moeops.dispatch.static import StaticDispatcher
from moeops.distributed import CostModel
from moeops.planner.configuration import Choice, Configuration
from moeops.planner.memory import gate_parameters, layer_memory
from moeops.planner.plan import make_plan
from moeops.planner.predict import CHUNKS, auto_choices, choices, predict, recommend
from moeops.planner.report import plan_text
from moeops.planner.switching import best_degree, degree_records

ROOT = Path(__file__).resolve().parents[1]
RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SIZES = {"num_experts": 16, "top_k": 2, "d_model": 64, "d_hidden": 48, "num_tokens": 96}


def model_of(**changes) -> CostModel:
    """Round numbers: a product takes 1 fs, a byte in memory 1 ps, between ranks 10 ps, and nothing else costs."""
    fields = {
        "device": "cuda",
        "experts": {"bfloat16": Direction(ExpertLaw(0, 0, 1e-15, 0), ExpertLaw(0, 0, 2e-15, 0))},
        "router": {"bfloat16": Direction(RouterLaw(0, 0, 0, 0), RouterLaw(0, 0, 0, 0))},
        "memory": BytesLaw(0, 1e-12),
        "inside_node": LinkLaw(0, 0, 1e-11),
        "overlap_loss": 0.0,
    }
    return CostModel(**{**fields, **changes})


def config_of(**changes) -> Configuration:
    return Configuration(**{"world_size": 4, "dtype": "bfloat16", **SIZES, **changes})


def host_of(first: float, forward: float, backward: float) -> dict:
    """Seconds per chunk."""
    cost = HostCost(*(HostLaw(0.0, s) for s in (0.0, first, forward, backward)))
    return {"eager": {name: cost for name in ("local", "exact", "gather", "static")}}


def test_how_far_tokens_travel_by_hand():
    """Weights of the ranks outside, there and back, and the layer on the ranks inside."""
    config, model = config_of(), model_of()
    own = 4 * 3 * 64 * 48 * 2  # bytes of a rank's experts
    records = {record["parallel"]: record for record in degree_records(model, config)}
    assert list(records) == [4, 2, 1]
    assert [record["weights"] for record in records.values()] == pytest.approx(
        [0, 2 * own * 1e-11, 2 * 3 * own * 1e-11]
    )
    for degree, record in records.items():
        inner = config_of(expert_parallel=degree)
        best, _ = recommend(inner, [predict(model, inner, choice) for choice in choices(inner)])
        assert record["seconds"] == pytest.approx(best.total + record["weights"])
        assert record["dispatcher"] == best.choice.dispatcher
    # Few tokens travel to many weights, and few weights to many tokens.
    assert best_degree(degree_records(model, config)) == 4
    assert best_degree(degree_records(model, config_of(num_tokens=100_000))) == 1
    # Of 8 ranks on nodes of 4, groups are in a node or whole nodes; with 2, the weights cross the network.
    spread = degree_records(
        model_of(between_nodes=LinkLaw(0, 0, 1e-9)), config_of(world_size=8, node_size=4)
    )
    weights = {record["parallel"]: record["weights"] for record in spread}
    assert list(weights) == [8, 4, 2, 1]
    assert weights[4] == pytest.approx(2 * own / 2 * 1e-9)
    assert weights[2] == pytest.approx(2 * own / 2 * 2 * 1e-9)  # two of the four are in the node
    assert degree_records(model, config_of(tensor_parallel=2)) == []
    assert degree_records(model, config_of(world_size=1)) == []


def test_one_chunk_by_hand():
    config, model = config_of(), model_of()
    row, pairs, tokens = 64 * 2, 96 * 2, 96
    weights = 3 * 64 * 48
    got = predict(model, config, Choice("exact"))
    # A token's two experts of 16 are on 1.8 of 4 ranks; ids and weights travel there, or their gradients back.
    ranks = 4 * (1 - 12 / 16 * 11 / 15)
    moved = (tokens + tokens * ranks) * row * 1e-12
    counts = 4 * (2 + 2) * 4 * 3 / 4 * 1e-11
    sent = tokens * ranks * (row + 8) * 3 / 4 * 1e-11
    assert got.forward.parts == pytest.approx(
        {
            "router": 0.0,
            "dispatch": moved,
            "exchange": counts + 2 * sent,
            "experts": pairs * weights * 1e-15,
            "combine": moved,
        }
    )
    assert got.forward.total == pytest.approx(sum(got.forward.parts.values()))
    # The gradients of weights, half of the experts' work, are computed while those of tokens travel.
    back = 2 * moved + 2 * sent + pairs * weights * 1e-15
    assert got.backward.total == pytest.approx(back)
    static = predict(model, config, Choice("static"))
    rows = 16 * config.capacity
    assert config.capacity == 15  # 1.25 * 96 * 2 / 16
    assert static.forward.parts["experts"] == pytest.approx(rows * weights * 1e-15)
    assert static.forward.parts["exchange"] == pytest.approx(2 * rows * row * 3 / 4 * 1e-11)
    padded = (tokens + pairs + pairs + rows) * row * 1e-12
    assert static.forward.parts["dispatch"] == pytest.approx(padded)


def test_gathered_tokens_travel_beside_the_gate():
    model = model_of(
        router={"bfloat16": Direction(RouterLaw(1.0, 0, 0, 0), RouterLaw(1.0, 0, 0, 0))}
    )
    config = config_of(imbalance=1.25)
    got = predict(model, config, Choice("gather"))
    row, tokens, experts = 64 * 2, 96, 96 * 2 * 1.25 * 3 * 64 * 48 * 1e-15
    sent = tokens * 3 * (row + 8) * 1e-11
    assert got.forward.parts == pytest.approx(
        {"router": 1.0, "dispatch": 0, "exchange": 2 * sent, "experts": experts, "combine": 0}
    )
    early = tokens * 3 * row * 1e-11
    assert got.forward.hidden == pytest.approx(early)
    assert got.forward.total == pytest.approx(1.0 + 2 * sent - early + experts)
    assert got.backward.total == pytest.approx(1.0 + 2 * sent - early + 2 * experts)
    # Measured collectives count instead of an all-to-all's, inside a node.
    measured = dataclasses.replace(
        model, all_gather=LinkLaw(1e-3, 0, 0), reduce_scatter=LinkLaw(3e-3, 0, 0)
    )
    exchange = predict(measured, config, Choice("gather")).forward.parts["exchange"]
    assert exchange == pytest.approx(4e-3)
    nodes = config_of(world_size=4, node_size=2)
    both = dataclasses.replace(measured, between_nodes=LinkLaw(0, 0, 1e-10))
    exchange = predict(both, nodes, Choice("gather")).forward.parts["exchange"]
    assert exchange == pytest.approx(2 * tokens * 2 * (row + 8) * 1e-10)


def test_gather_is_for_few_ranks_and_loads_that_fit():
    copy = model_of(host_copy_seconds=1e-3, memory=BytesLaw(0, 0))
    two = config_of(world_size=2, top_k=8)
    assert best_of(copy, two).dispatcher == "gather"
    assert best_of(copy, config_of(world_size=2, top_k=8, imbalance=2.0)).dispatcher == "gather"
    # Above 2 ranks there are rows for 1.5 times the mean.
    uneven = config_of(top_k=8, imbalance=1.6, num_experts=64)
    assert best_of(copy, uneven).dispatcher != "gather"
    many = config_of(world_size=16, num_tokens=1 << 20, node_size=16)
    assert best_of(model_of(), many).dispatcher == "exact"
    dispatcher = GatherDispatcher(8, RankGroup("0", 2, 0))
    assert two.kept_rows("gather") == dispatcher.rows_for(two.num_tokens, 8)[0]
    dispatcher = GatherDispatcher(16, RankGroup("0", 4, 0))
    assert uneven.kept_rows("gather") == dispatcher.rows_for(uneven.num_tokens, 8)[0]


def test_chunks_overlap_as_the_dispatchers_queue_them():
    config, model = config_of(), model_of(memory=BytesLaw(0, 0))
    row_seconds = 96 * 1.8 * (64 * 2 + 8) * 3 / 4 * 1e-11
    experts = 96 * 2 * 3 * 64 * 48 * 1e-15
    assert row_seconds > experts
    counts = [4 * (2 * n + 2) * 4 * 3 / 4 * 1e-11 for n in (1, 2)]
    got = predict(model, config, Choice("exact", 2))
    # Links are never idle: the second chunk goes there beside the first one's experts, and so on.
    first, second = (2 * row_seconds + wait for wait in counts)
    assert predict(model, config, Choice("exact")).forward.total == pytest.approx(first + experts)
    assert got.forward.total == pytest.approx(second)
    assert got.forward.hidden == pytest.approx(experts)
    half = dataclasses.replace(model, overlap_loss=0.5)
    lossy = predict(half, config, Choice("exact", 2))
    assert lossy.forward.total == pytest.approx(second + 0.5 * experts)


def test_directions_have_chunks_of_their_own():
    config, model = config_of(), model_of(memory=BytesLaw(0, 0))
    pairs = [(n, m) for n in (1, 2, 4) for m in (1, 2, 4)]
    for dispatcher in ("exact", "gather", "static"):
        for forward, backward in pairs:
            got = predict(model, config, Choice(dispatcher, (forward, backward)))
            assert got.forward == predict(model, config, Choice(dispatcher, forward)).forward
            if forward == backward or backward > 1:
                one = predict(model, config, Choice(dispatcher, backward)).backward
                assert got.backward == one
    assert str(Choice("exact", (4, 3))) == "exact, (4, 3) chunks"
    assert (
        predict(model, config, Choice("exact", (2, 2))).total
        == predict(model, config, Choice("exact", 2)).total
    )
    # Another cut than the forward's copies rows and pre-activations: read and written twice.
    slow = model_of(memory=BytesLaw(0, 1e-9))
    same, other = (predict(slow, config, Choice("exact", pair)) for pair in ((2, 2), (1, 2)))
    kept = 96 * 2 * 2 * 48 * 2 + 96 * 64 * 2
    copied = other.backward.parts["experts"] - same.backward.parts["experts"]
    assert copied == pytest.approx(4 * kept * 1e-9)


def test_gradients_of_weights_hide_the_last_exchange_of_a_backward():
    """Where experts take longer than links; half of their backward is gradients of weights."""
    config = config_of(num_tokens=1 << 16, d_model=1024, d_hidden=4096)
    model = model_of(memory=BytesLaw(0, 0), inside_node=LinkLaw(0, 0, 1e-12))
    leader = predict(
        dataclasses.replace(model, between_nodes=LinkLaw(0, 0, 1e-12)),
        dataclasses.replace(config, node_size=2),
        Choice("static", form="leader"),
    ).backward
    assert leader.hidden == 0
    one, two = (predict(model, config, Choice("static", n)) for n in (1, 2))
    exchange, experts = (one.backward.parts[name] for name in ("exchange", "experts"))
    assert experts > 4 * exchange
    assert one.backward.total == pytest.approx(exchange / 2 + experts)
    # Only the first chunk's way there is seen.
    assert two.backward.total == pytest.approx(exchange / 4 + experts)
    assert two.backward.hidden == pytest.approx(3 / 4 * exchange)


def test_auto_is_what_a_layer_would_choose():
    model = model_of(inside_node=LinkLaw(0, 0, 1e-12), all_gather=None, reduce_scatter=None)
    config = config_of(num_tokens=1 << 16, d_model=1024, d_hidden=512)
    found = auto_choices(model, config)
    assert [choice.dispatcher for choice in found] == ["exact", "gather", "static"]
    for choice, record in zip(found, (Exact, Gather, Static), strict=True):
        ranks = ExpertRanks("FMoE", config.local_experts, RankGroup("0", 4, 0), top_k=2)
        options = {"capacity": 1.25} if record is Static else {}
        mlps = MlpSizes(1024, 512, 3, "bfloat16")
        sizes = record(**options, mlps=mlps).layer_sizes(ranks, 1 << 16)
        best = schedule_of(sizes, model).best()
        assert choice.degrees == best[:2], choice
        assert max(best[:2]) > 1
    nodes = config_of(world_size=8, node_size=4, num_tokens=1 << 16)
    with_both = dataclasses.replace(model, between_nodes=LinkLaw(0, 0, 1e-10))
    assert {choice.form for choice in auto_choices(with_both, nodes)} == {"2d"}
    plan = make_plan(model, config)
    assert [(c["dispatcher"], c["n_chunks"]) for c in plan["auto"]] == [c[:2] for c in found]
    assert 'n_chunks="auto" of this profile, ms' in plan_text(plan)
    json.dumps(plan)
    assert make_plan(model_of(), config_of(world_size=1))["auto"] == []


def test_the_host_delays_the_first_expert_and_the_end():
    config = config_of()
    free = predict(model_of(), config, Choice("exact"))
    late = predict(model_of(host=host_of(1.0, 1.0, 0.0)), config, Choice("exact"))
    rest = free.forward.parts["experts"] + free.forward.parts["combine"]
    assert late.forward.total == pytest.approx(1.0 + rest, rel=0.01)
    end = predict(model_of(host=host_of(0.0, 2.0, 0.0)), config, Choice("exact"))
    assert end.forward.total == pytest.approx(2.0, rel=0.01)
    assert end.host_bound
    assert not free.host_bound
    backward = predict(model_of(host=host_of(0.0, 0.0, 3.0)), config, Choice("static"))
    assert backward.backward.total == pytest.approx(3.0, rel=0.01)
    assert backward.backward.device == pytest.approx(
        predict(model_of(), config, Choice("static")).backward.total
    )


def best_of(model: CostModel, config: Configuration) -> Choice:
    predictions = [predict(model, config, choice) for choice in choices(config)]
    best, reason = recommend(config, predictions)
    assert reason
    return best.choice


def test_latency_wants_one_chunk_and_work_wants_more():
    big = config_of(num_tokens=1 << 20, d_model=1024, d_hidden=512)
    # 16 / 10 of a second of experts, and 32 / 10 of exchange that can cover it.
    assert best_of(model_of(), big).n_chunks == max(CHUNKS)
    slow = model_of(inside_node=LinkLaw(10.0, 0, 1e-11))
    assert best_of(slow, big).n_chunks == 1
    assert best_of(model_of(host=host_of(0.0, 10.0, 10.0)), big).n_chunks == 1
    assert best_of(model_of(overlap_loss=1.0), big).n_chunks == 1
    # Every chunk reads the weights again.
    floor = ExpertLaw(0, 1e-6, 1e-15, 0)
    heavy = model_of(experts={"bfloat16": Direction(floor, floor)})
    assert best_of(heavy, big).n_chunks == 1


def test_exact_pays_for_its_copy_and_static_for_its_padding():
    model = model_of(host_copy_seconds=1e-3)
    assert best_of(model, config_of()).dispatcher == "static"
    assert best_of(model, config_of(num_tokens=1 << 20)).dispatcher == "exact"
    # A capacity below the imbalance drops rows: never chosen for speed.
    assert best_of(model, config_of(imbalance=1.5)).dispatcher == "gather"
    assert best_of(model, config_of(imbalance=1.6)).dispatcher == "exact"


def test_many_small_messages_between_nodes_want_stages():
    config = config_of(world_size=16, node_size=4)
    slow = model_of(between_nodes=LinkLaw(0, 1e-3, 1e-11))
    assert best_of(slow, config).form in ("2d", "leader")
    assert best_of(model_of(between_nodes=LinkLaw(0, 0, 1e-11)), config).form == "flat"
    assert {choice.form for choice in choices(config_of())} == {"flat"}


def test_imbalance_scales_the_busiest_ranks_rows():
    even, uneven = (
        predict(model_of(), config_of(imbalance=x), Choice("exact")) for x in (1.0, 2.0)
    )
    experts = [p.forward.parts["experts"] for p in (even, uneven)]
    assert experts[1] == pytest.approx(2 * experts[0])
    assert uneven.backward.parts["exchange"] == pytest.approx(2 * even.backward.parts["exchange"])


def test_shards_are_experts_of_less_width():
    whole, shards = config_of(), config_of(tensor_parallel=2)
    assert shards.local_experts == 2 * whole.local_experts
    assert shards.hidden == 24
    assert shards.expert_parameters == whole.expert_parameters
    one, two = (predict(model_of(), c, Choice("exact")).forward.parts for c in (whole, shards))
    assert two["experts"] == pytest.approx(one["experts"])
    # A token of two experts goes to 1.8 of 4 ranks, or with shards to both ranks of 1.53 pairs.
    assert whole.reached(4) == pytest.approx(4 * (1 - 12 / 16 * 11 / 15))
    assert shards.reached(4) == pytest.approx(2 * 2 * (1 - 8 / 16 * 7 / 15))
    assert two["exchange"] > shards.reached(4) / whole.reached(4) * one["exchange"]


@pytest.mark.parametrize(("factor", "pairs"), [(1.25, 192), (1.0, 97), (0.3, 1000), (2.0, 3)])
def test_capacity_is_the_dispatchers(factor, pairs):
    config = config_of(world_size=1, num_tokens=pairs, top_k=1, capacity_factor=factor)
    assert config.capacity == StaticDispatcher(16, None, factor).capacity_of(pairs)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_weight_bytes_are_those_of_a_real_layer(activation):
    config = config_of(world_size=4, activation=activation, optimizer="adamw-fp32")
    layer = moeops.FMoETransformerMLP(
        config.local_experts, 64, 48, activation, bias=False, dtype=torch.bfloat16
    )
    gate = moeops.gates.NaiveGate(64, 16, 1, 2)
    real = sum(p.numel() for p in [*layer.experts.parameters(), *gate.parameters()])
    memory = layer_memory(config, Choice("exact"))
    assert memory.weights == memory.gradients == 2 * real
    assert memory.optimizer == 12 * real
    assert gate_parameters(config) == sum(p.numel() for p in gate.parameters())


def test_activations_are_those_that_a_real_layer_saves():
    config = config_of(world_size=1, num_tokens=512, d_model=64, d_hidden=96, dtype="float32")
    layer = moeops.FMoETransformerMLP(16, 64, 96, "swiglu", bias=False, top_k=2)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = layer(torch.randn(512, 64, requires_grad=True))
    assert y.requires_grad
    got = layer_memory(config, Choice("exact")).activations
    assert got == pytest.approx(sum(saved.values()), rel=0.05)


def test_plan_is_whole():
    config = config_of(world_size=32, expert_parallel=16, node_size=8, num_layers=3)
    model = model_of(
        between_nodes=LinkLaw(0, 1e-6, 2e-11), host=host_of(1e-5, 1e-4, 1e-4), overlap_loss=0.5
    )
    plan = make_plan(model, config)
    assert json.loads(json.dumps(plan)) == plan
    assert len(plan["choices"]) == 2 * 3 * len(CHUNKS) + 1
    best = min(c["seconds"] for c in plan["choices"])
    assert plan["recommended"]["seconds"] <= 1.01 * best
    assert plan["recommended"]["seconds_all_layers"] == 3 * plan["recommended"]["seconds"]
    rows = 96 * 2 * 64 * 2
    flat, two, leader = plan["exchange"]
    assert flat["bytes_inside_node"] == pytest.approx(rows * 7 / 16)
    assert flat["bytes_between_nodes"] == pytest.approx(rows / 2)
    assert (flat["messages_inside_node"], flat["messages_between_nodes"]) == (7, 8)
    # A token goes to each of two nodes once: two experts of 16 are on 1.53 of them.
    between = 96 * 2 * (1 - 8 / 16 * 7 / 15) * 64 * 2 / 2
    assert two["bytes_inside_node"] == pytest.approx(rows * 7 / 8)
    assert two["bytes_between_nodes"] == pytest.approx(between)
    assert leader["bytes_between_nodes"] == pytest.approx(8 * rows / 2)
    # The experts' gradients are summed over 2 copies on other nodes.
    weights = config.expert_parameters * 2
    assert plan["gradients"] == {
        "copies": 2,
        "bytes": weights,
        "link": "between_nodes",
        "seconds": pytest.approx(2 * 1e-6 + weights * 2e-11),
    }
    text = " ".join(plan["assumptions"])
    assert "50 GB/s" in text
    assert "0.50 of the shorter one's time" in text


def test_few_rows_per_expert_are_warned_of():
    floor = ExpertLaw(0, 100e-15, 1e-15, 0)  # as long as 100 rows
    model = model_of(experts={"bfloat16": Direction(floor, floor)})
    (warning,) = make_plan(model, config_of(num_tokens=96))["warnings"]
    assert "an expert gets 48 rows at a time: below 100" in warning
    assert make_plan(model, config_of(num_tokens=9600))["warnings"] == []


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    model_of().save(path)
    return path


SIZE_OPTIONS = ("--num-experts", "16", "--top-k", "2", "--d-model", "64", "--d-hidden", "48")


def test_tables_and_json(profile, capsys):
    options = ["plan", "--profile", str(profile), "--world", "4", *SIZE_OPTIONS, "--tokens", "96"]
    assert main([*options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(options) == 0
    text = capsys.readouterr().out
    best = plan["recommended"]
    assert f"RECOMMENDED {best['dispatcher']}" in text
    for part in ("router", "dispatch", "exchange", "experts", "combine", "weights", "assumptions"):
        assert part in text
    named = ["plan", "--profile", str(profile), "--world", "8", "--model", "mixtral_8x7b", "--json"]
    assert main([*named, "--tokens", "1024"]) == 0
    config = json.loads(capsys.readouterr().out)["configuration"]
    assert (config["num_experts"], config["d_hidden"], config["num_tokens"]) == (8, 14336, 1024)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--world", "5"),
            r"num_experts must be a multiple of the 5 ranks .*got 16.*--expert-parallel",
        ),
        (("--world", "16", "--node-size", "4"), r"between_nodes must be measured or given"),
        (("--world", "12", "--expert-parallel", "8"), "world_size must be a multiple of"),
        (("--world", "4", "--top-k", "17"), "top_k must be at most the 16 experts, got 17"),
        (("--world", "4", "--imbalance", "5"), r"imbalance must be from 1 .* to 4"),
        (
            ("--world", "4", "--expert-tensor-parallel", "3"),
            "must be a multiple of tensor_parallel",
        ),
        (("--world", "4", "--dtype", "float16"), "must be profiled for float16"),
        (("--world", "4", "--tokens", "0"), "num_tokens must be at least 1, got 0"),
        (("--world", "4", "--capacity-factor", "0"), "capacity_factor must be above 0"),
        (("--world", "4", "--inside-node", "fast"), "--inside-node must be GB_PER_SECOND,MICRO"),
        (("--world", "4", "--between-nodes", "0,2"), "--between-nodes must be GB_PER_SECOND"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(profile, capsys, options, text):
    base = ["plan", "--profile", str(profile), *SIZE_OPTIONS, "--tokens", "96"]
    assert main([*base, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("moeops plan: ")

    assert re.search(text, err), err


def test_missing_sizes_and_files(profile, tmp_path, capsys):
    assert main(["plan", "--profile", str(profile), "--world", "4", "--top-k", "2"]) == 2
    err = capsys.readouterr().err
    assert "--num-experts, --d-model, --d-hidden, --tokens must be given" in err
    for path in (tmp_path / "none.json", tmp_path / "cut.json"):
        (tmp_path / "cut.json").write_text("{")
        assert main(["plan", "--profile", str(path), "--world", "4", "--model", "qwen3_30b"]) == 2
        assert str(path) in capsys.readouterr().err
    assert main(["profile", "--dtype", "int8", "--out", str(tmp_path / "x.json")]) == 2
    assert "--dtype must be from" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_import_moeops_does_not_import_the_planner():
    code = "import sys, moeops; assert not [m for m in sys.modules if 'planner' in m]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.distributed
def test_two_ranks_profile_and_check(tmp_path, capsys):
    """The whole way: measure on two ranks, fit, refit, plan, compare with measured layers."""
    out = tmp_path / "profile.json"
    command = [*RUN, "-m", "moeops", "profile", "--quick", "--device", "cpu", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    model = CostModel.load(out)
    assert model.machine["ranks"] == 2
    assert {"experts", "router", "memory", "inside_node", "overlap", "host"} <= set(
        model.measurements
    )
    for part in ("experts", "router"):
        laws = getattr(model, part)["float32"]
        rows = model.measurements[part]
        assert {row["way"] for row in rows} == {"forward", "backward"}
        assert min(row["seconds"] for row in rows) > 0
        assert laws.forward.residual < 1
    kinds = {row["op"] for row in model.measurements["inside_node"]}
    assert kinds == {"all_to_all_single", "batch_isend_irecv"}
    assert set(model.host["eager"]) == {"local", "exact", "gather", "static"}
    assert "experts float32 forward" in result.stdout

    again = tmp_path / "again.json"
    assert main(["profile", "--refit", str(out), "--out", str(again)]) == 0
    assert CostModel.load(again) == model
    options = ["--world", "8", "--model", "mixtral_8x7b", "--dtype", "float32", "--tokens", "512"]
    assert main(["plan", "--profile", str(out), *options, "--json"]) == 0

    capsys.readouterr()
    measured = tmp_path / "parallel.json"
    measured.write_text(json.dumps(PARALLEL))
    check = ["--profile", str(out), "--measured", str(measured), "--json", str(tmp_path / "c.json")]
    assert plan_check.main(check) == 0
    text = capsys.readouterr().out
    assert "forward + backward: median error" in text
    assert "SKIPPED tiny exact, compiled: the profile has no host time" in text
    assert "SKIPPED tiny exact, 4 chunks, eager: not measured: rank 0: no" in text
    record = json.loads((tmp_path / "c.json").read_text())
    assert [row["kind"] for row in record["comparisons"]] == [
        "exchange", "forward", "forward + backward", "forward", "forward + backward", "peak memory",
    ]  # fmt: skip
    for row in record["comparisons"]:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)


@pytest.mark.cuda
def test_profile_on_gpus(tmp_path, cuda_device):
    out = tmp_path / "profile.json"
    size = min(2, torch.cuda.device_count())
    command = [*RUN[:-1], f"--nproc-per-node={size}", "-m", "moeops", "profile", "--quick"]
    result = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    model = CostModel.load(out)
    assert model.device == "cuda"
    assert 0 < model.host_copy_seconds < 1e-2
    assert model.memory.seconds(1 << 30) > 1e-5
    assert set(model.host["eager"]) == (
        {"local", "exact", "gather", "static"} if size > 1 else {"local"}
    )


def _spread(median: float) -> dict:
    return {"median": median, "p10": median, "p90": median, "count": 12}


PARALLEL = {  # as benchmarks.parallel writes it, in microseconds
    "machine": {"torch": "2"},
    "ranks": 2,
    "dtype": "float32",
    "tokens_per_rank": [48],
    "exchange": [
        {"num_bytes": 65536, "num_ranks": 2, "times": {"torch, splits": _spread(300.0)}},
        {"num_bytes": 131072, "num_ranks": 2, "times": None, "error": "late"},
    ],
    "layers": [
        {"shape": "tiny", "label": "one rank", "mode": "eager", "forward": _spread(900.0), "total": _spread(1e3)},
        {"shape": "tiny", "label": "exact, 2 chunks", "mode": "eager", "forward": _spread(4e3),
         "total": _spread(9e3), "peak_bytes": 100000},
        {"shape": "tiny", "label": "exact, 4 chunks", "mode": "eager", "error": "rank 0: no"},
        {"shape": "tiny", "label": "exact", "mode": "compiled", "forward": _spread(1.0), "total": _spread(2.0)},
    ],
}  # fmt: skip


def test_error_of_a_comparison_by_hand():
    one = plan_check.Comparison("forward", "a", 2.0, 3.0)
    two = plan_check.Comparison("forward", "b", 4.0, 3.0)
    assert (one.error, two.error) == (0.5, -0.25)
    assert plan_check.summaries([one, two]) == {
        "forward": {"count": 2, "median": 0.375, "worst": 0.5, "worst_label": "a"}
    }
    assert plan_check.choice_of("static") == (False, Choice("static"))
    assert plan_check.choice_of("exact, 4 chunks") == (False, Choice("exact", 4))
    assert plan_check.choice_of("one rank") == (True, Choice("exact"))
    with pytest.raises(ValueError, match="unknown row 'other'"):
        plan_check.choice_of("other")
