"""Cost models: their laws, what they compute from them, and the file they are kept in."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

from moeops.cost.laws import (
    BytesLaw,
    Direction,
    ExpertLaw,
    HostCost,
    HostLaw,
    LinkLaw,
    RouterLaw,
    expert_features,
    permute_bytes,
    router_features,
)
from moeops.distributed import CostModel
from moeops.profiling.fit import fit_model, fit_nonnegative
from moeops.profiling.machine import check_machine, describe_machine
from processes import run_checks

EXPERT = ExpertLaw(2e-5, 3e-13, 2.5e-15, 2e-13)
BACKWARD = ExpertLaw(4e-5, 6e-13, 5e-15, 4e-13)
ROUTER = RouterLaw(1e-5, 6e-15, 2e-12, 3e-13)
NEAR, FAR = LinkLaw(1e-5, 1e-6, 1 / 300e9), LinkLaw(0.0, 5e-6, 1 / 50e9)
HOST = HostCost(HostLaw(1e-4, 0.0), HostLaw(1e-4, 1e-4), HostLaw(2e-4, 3e-4), HostLaw(1e-4, 5e-4))


def full_model() -> CostModel:
    """A model that knows everything."""
    return CostModel(
        device="cuda",
        experts={"bfloat16": Direction(EXPERT, BACKWARD)},
        router={"bfloat16": Direction(ROUTER, ROUTER)},
        memory=BytesLaw(4e-6, 1 / 4e12),
        host_copy_seconds=2e-5,
        inside_node=NEAR,
        between_nodes=FAR,
        all_gather=LinkLaw(1e-5, 0.0, 1 / 250e9),
        reduce_scatter=LinkLaw(2e-5, 0.0, 1 / 200e9),
        all_reduce=LinkLaw(1e-5, 0.0, 1 / 300e9),
        host={"eager": {"local": HOST, "exact": HOST, "gather": HOST, "static": HOST}},
        overlap_loss=0.25,
        machine={"gpu": "a GPU", "ranks": 2, "node_size": 2},
        measurements={"host_copy": [{"seconds": 2e-5}]},
    )


def measurements_of(model: CostModel) -> dict:
    """What a machine that follows the model's laws would have measured."""
    experts, router = [], []
    for way in ("forward", "backward"):
        law, gate = getattr(model.experts["bfloat16"], way), getattr(model.router["bfloat16"], way)
        for d, h, e in ((1024, 512, 4), (2048, 768, 64), (4096, 14336, 8), (512, 2048, 16)):
            for rows in (16 * e, 100 * e, 1000 * e):
                facts = {
                    "rows": rows,
                    "d_model": d,
                    "d_hidden": h,
                    "num_projections": 3,
                    "num_experts": e,
                }
                seconds = law.seconds(expert_features(rows, d, h, 3, 2, e))
                experts.append({"dtype": "bfloat16", "way": way, "seconds": seconds, **facts})
            for tokens in (100, 10000):
                facts = {"num_tokens": tokens, "d_model": d, "num_experts": e}
                seconds = gate.seconds(router_features(tokens, d, e, 2))
                router.append({"dtype": "bfloat16", "way": way, "seconds": seconds, **facts})

    def link(law):
        sizes = [(m, m * b) for m in (1, 3, 7) for b in (4096, 1 << 20, 1 << 26)]
        return [{"num_messages": m, "num_bytes": b, "seconds": law.seconds(b, m)} for m, b in sizes]

    memory = [{"num_bytes": b, "seconds": model.memory.seconds(b)} for b in (1e5, 1e7, 1e9)]
    host = [
        {
            "mode": "eager", "dispatcher": dispatcher, "n_chunks": n,
            **{part: getattr(HOST, part).seconds(n) for part in ("router", "first", "forward", "backward")},
        }
        for dispatcher in ("local", "exact", "gather", "static")
        for n in (1, 2, 4)
    ]  # fmt: skip
    # 0.25 of the shorter one is lost.
    overlap = [{"exchange_seconds": 2.0, "experts_seconds": 4.0, "both_seconds": 4.5}]
    return {
        "experts": experts,
        "router": router,
        "memory": memory,
        "host_copy": [{"seconds": s} for s in (1e-5, 2e-5, 9e-5)],
        "inside_node": link(model.inside_node),
        "between_nodes": link(model.between_nodes),
        **{
            name: [
                {**row, "num_messages": 0, "seconds": law.seconds(row["num_bytes"], 1)}
                for row in link(law)
            ]
            for name in ("all_gather", "reduce_scatter", "all_reduce")
            for law in [getattr(model, name)]
        },
        "host": host,
        "overlap": overlap,
    }


def test_fit_recovers_every_law():
    want = full_model()
    got = fit_model(measurements_of(want), "cuda", want.machine)
    links = ("inside_node", "between_nodes", "all_gather", "reduce_scatter", "all_reduce")
    for part in ("memory", *links):
        assert_same_law(getattr(got, part), getattr(want, part))
    for way in ("forward", "backward"):
        assert_same_law(
            getattr(got.experts["bfloat16"], way), getattr(want.experts["bfloat16"], way)
        )
        assert_same_law(getattr(got.router["bfloat16"], way), getattr(want.router["bfloat16"], way))
    for dispatcher in ("local", "exact", "gather", "static"):
        for part in ("router", "first", "forward", "backward"):
            assert_same_law(getattr(got.host["eager"][dispatcher], part), getattr(HOST, part))
    assert got.host_copy_seconds == want.host_copy_seconds
    assert got.overlap_loss == pytest.approx(0.25)


def assert_same_law(got, want):
    assert type(got) is type(want)
    for field in dataclasses.fields(want):
        if field.name == "residual":
            assert got.residual < 1e-6
        else:
            value = getattr(want, field.name)
            assert getattr(got, field.name) == pytest.approx(value, rel=1e-4, abs=1e-18), field.name


def test_fit_is_the_best_with_noise_and_never_negative():
    torch.manual_seed(0)
    features = [(1.0, 10.0**power, 10.0 ** (power / 2)) for power in range(8)]
    true = (1e-3, 2e-6, 0.0)
    seconds = [
        sum(c * f for c, f in zip(true, row, strict=True)) * float(1 + 0.1 * torch.randn(()))
        for row in features
    ]
    coefficients, residual = fit_nonnegative(features, seconds)
    assert min(coefficients) >= 0
    assert residual < 0.15

    def error(values):
        errors = [
            sum(c * f for c, f in zip(values, row, strict=True)) / s - 1
            for row, s in zip(features, seconds, strict=True)
        ]
        return (sum(e * e for e in errors) / len(errors)) ** 0.5

    assert residual == pytest.approx(error(coefficients))
    assert residual <= error(true)
    for column in range(3):
        for factor in (0.99, 1.01):
            moved = [c * (factor if i == column else 1) for i, c in enumerate(coefficients)]
            assert error(moved) >= residual - 1e-12


def test_fit_refuses_times_that_are_none():
    with pytest.raises(ValueError, match="seconds must be above 0"):
        fit_nonnegative([(1.0,)], [0.0])
    with pytest.raises(ValueError, match="seconds must be above 0"):
        fit_nonnegative([], [])


def test_exchange_by_hand():
    model = full_model()
    # 8 ranks on 2 nodes: of 80 MB 3 parts of 10 MB stay in the node, 4 leave it, one stays on the rank.
    near = 1e-5 + 3 * 1e-6 + 30e6 / 300e9
    far = 4 * 5e-6 + 40e6 / 50e9
    assert model.all_to_all_seconds(80e6, 8, 4) == pytest.approx(max(near, far))
    assert model.all_to_all_seconds(80e6, 8) == pytest.approx(1e-5 + 7e-6 + 70e6 / 300e9)
    assert model.all_to_all_seconds(80e6, 1) == 0.0
    # Stages: 3 / 4 inside, then 1 / 2 to the other node, rows copied between.
    stages = 1e-5 + 3e-6 + 60e6 / 300e9 + 5e-6 + 40e6 / 50e9 + 4e-6 + 160e6 / 4e12
    assert model.hierarchical_seconds(80e6, 8, 4) == pytest.approx(stages)
    assert model.hierarchical_seconds(80e6, 4, 4) == model.all_to_all_seconds(80e6, 4)
    # The leader takes 3 buffers and hands them out, and sends half of 4 buffers.
    leader = 2 * (1e-5 + 3e-6 + 240e6 / 300e9) + 5e-6 + 160e6 / 50e9 + 2 * (4e-6 + 640e6 / 4e12)
    assert model.hierarchical_seconds(80e6, 8, 4, "leader") == pytest.approx(leader)


def test_experts_and_router_by_hand():
    model = full_model()
    weights, rows = 3 * 1024 * 512, 4096
    traffic = rows * 2 * 2 * (2 * 1024 + 3 * 512)  # written and read, bfloat16
    want = 2e-5 + 8 * weights * 3e-13 + rows * weights * 2.5e-15 + traffic * 2e-13
    assert model.expert_seconds(rows, 1024, 512, 3, torch.bfloat16, num_experts=8) == pytest.approx(
        want
    )
    assert model.expert_seconds(0, 64, 64, 2, "bfloat16") == pytest.approx(
        2e-5 + 2 * 64 * 64 * 3e-13
    )
    backward = model.expert_seconds(rows, 1024, 512, 3, "bfloat16", True, num_experts=8)
    assert backward == pytest.approx(2 * want)
    scores = 1000 * 16
    assert model.router_seconds(1000, 64, 16, "bfloat16") == pytest.approx(
        1e-5 + scores * 64 * 6e-15 + scores * 2e-12 + 1000 * 64 * 2 * 3e-13
    )
    assert permute_bytes(10, 20, 8) == 240


def test_more_work_takes_longer():
    model = full_model()
    sizes = [1e3, 1e5, 1e6, 1e8, 1e9]
    for ranks, node in ((2, 2), (8, 4), (64, 8)):
        times = [model.all_to_all_seconds(size, ranks, node) for size in sizes]
        assert times == sorted(set(times))
    rows = [model.expert_seconds(n, 512, 512, 3, "bfloat16") for n in (0, 1, 100, 10000)]
    assert rows == sorted(set(rows))
    by_ranks = [model.all_to_all_seconds(1e8, ranks, 8) for ranks in (2, 4, 8, 16, 64, 1024)]
    assert by_ranks == sorted(set(by_ranks))


def test_rates_alone_make_a_model():
    model = CostModel.from_rates(
        products_per_second=4e14,
        link_bytes_per_second=3e11,
        message_seconds=1e-6,
        memory_bytes_per_second=4e12,
        dtypes=("bfloat16", "float32"),
    )
    products = 1000 * 2 * 64 * 32
    traffic = 1000 * 4 * 2 * (2 * 64 + 2 * 32)
    assert model.expert_seconds(1000, 64, 32, 2, "float32") == pytest.approx(
        products / 4e14 + traffic / 4e12
    )
    assert model.all_to_all_seconds(4e9, 4) == pytest.approx(3e-6 + 3e9 / 3e11)


def test_what_was_not_measured_is_asked_for():
    model = CostModel.from_rates(products_per_second=1e14, link_bytes_per_second=1e11)
    with pytest.raises(
        ValueError, match=r"between_nodes must be measured or given.*--between-nodes"
    ):
        model.all_to_all_seconds(1e6, 16, 8)
    with pytest.raises(ValueError, match=r"experts must be profiled for float64.*--dtype float64"):
        model.expert_seconds(1, 8, 8, 2, torch.float64)
    with pytest.raises(ValueError, match="router must be profiled"):
        model.router_seconds(1, 8, 8, "bfloat16")
    alone = dataclasses.replace(model, inside_node=None, memory=None)
    with pytest.raises(ValueError, match=r"inside_node must be measured.*torchrun"):
        alone.all_to_all_seconds(1e6, 2)
    with pytest.raises(ValueError, match="memory must be profiled"):
        alone.memory_seconds(1e6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.all_to_all_seconds(-1, 2), "num_bytes at least 0"),
        (lambda m: m.all_to_all_seconds(1, 0), "world_size must be at least 1"),
        (lambda m: m.all_to_all_seconds(1, 6, 4), "multiple of node_size, got 6 and 4"),
        (lambda m: m.expert_seconds(-1, 8, 8, 2, "bfloat16"), "rows must be at least 0"),
        (lambda m: m.expert_seconds(1, 0, 8, 2, "bfloat16"), "sizes at least 1"),
        (lambda m: m.expert_seconds(1, 8, 8, 2, torch.int32), "dtype must be one of"),
        (lambda m: m.hierarchical_seconds(1, 8, 4, "3d"), "form must be '2d' or 'leader'"),
    ],
)
def test_bad_sizes_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(full_model())


def test_file_holds_everything(tmp_path):
    model, path = full_model(), tmp_path / "new" / "model.json"
    model.save(path)
    assert CostModel.load(path) == model
    bare = CostModel()
    bare.save(path)
    assert CostModel.load(path) == bare
    assert [entry.name for entry in path.parent.iterdir()] == ["model.json"]


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "model.json"
    full_model().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(full_model(), overlap_loss=float("nan")).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.json"]


def _set(record: dict, keys: str, value) -> None:
    *path, last = keys.split(".")
    for key in path:
        record = record[key]
    if value is None:
        del record[last]
    else:
        record[last] = value


@pytest.mark.parametrize(
    ("keys", "value", "text"),
    [
        ("format", "a model of something else", "got a file of the kind 'a model of something"),
        ("version", 99, "must have version 2, got 99"),
        ("memory.seconds_per_byte", -1.0, "memory.seconds_per_byte must be finite and at least 0"),
        ("memory.seconds_per_byte", "fast", "memory.seconds_per_byte must be a number"),
        ("memory.seconds_per_byte", True, "memory.seconds_per_byte must be a number"),
        ("inside_node.peer_seconds", None, r"inside_node must have .*peer_seconds"),
        ("host.eager.exact.first", None, "first"),
        ("experts.bfloat16.backward", None, "backward"),
        ("experts.int8", {}, "dtype must be one of"),
        ("measurements", [], "measurements must be an object"),
        ("device", "tpu", "device must be 'cpu' or 'cuda'"),
        ("router", None, "router"),
        ("extra", 1, "extra"),
    ],
)
def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, keys, value, text):
    path = tmp_path / "model.json"
    full_model().save(path)
    record = json.loads(path.read_text())
    _set(record, keys, value)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=text) as caught:
        CostModel.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'{"format": "moeops cost', b"[1, 2]", b"\xff\xfe\x00"])
def test_cut_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        CostModel.load(path)
    with pytest.raises(OSError, match=r"none\.json"):
        CostModel.load(tmp_path / "none.json")


def test_profiles_of_other_machines_are_refused():
    cpu = torch.device("cpu")
    own = CostModel(device="cpu", machine=describe_machine(cpu))
    check_machine("FMoE", own, cpu)
    check_machine(
        "FMoE", CostModel(device="cuda"), cpu
    )  # made by hand: for no machine in particular
    for changes, said in (
        (
            {"machine": {**own.machine, "cores": 1000}},
            f"cores is {os.cpu_count()}, got one of 1000",
        ),
        ({"machine": {**own.machine, "processor": "a 6502"}}, "got one of 'a 6502'"),
        ({"device": "cuda"}, "device is 'cpu', got one of 'cuda'"),
    ):
        with pytest.raises(ValueError, match=f"FMoE: cost_model must be .* {said}"):
            check_machine("FMoE", dataclasses.replace(own, **changes), cpu)


@pytest.mark.distributed
def test_volumes_and_costs_are_those_of_real_layers(tmp_path):
    run_checks("plan_checks job_checks", 2, "gloo", tmp_path)


@pytest.mark.cuda
def test_volumes_on_nccl(tmp_path, cuda_device):
    run_checks("plan_checks job_checks", 2, "nccl", tmp_path)
