"""The benchmark end to end on tiny shapes, and its guards: a wrong result is never timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

# At the end, so that an installed moeops is not hidden by the source tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_gates, gates_table, profile, registry, run, timing
from benchmarks.inputs import BlockProblem, block_reference, choose_experts, make_block
from benchmarks.registry import Case, Entry, WrongResult, compare, compare_exact
from benchmarks.shapes import GATES as SHAPES_OF_GATES
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Runner, Spread, measure
from moeops import reference

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--repeats", "3", "--budget-seconds", "0.01"]
PEERS = "dense,moeops,loop,loop-unbound,torch,torch-inverse,torch-gather,copy"


@pytest.fixture(autouse=True)
def small_flush(monkeypatch):
    """Cold caches matter for times only, and no test reads one."""
    monkeypatch.setattr(timing, "CPU_FLUSH_BYTES", 1 << 12)


def run_benchmark(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    """Exit code and the JSON of one run."""
    path = tmp_path / "out.json"
    code = run.main([*QUICK, *arguments, "--json", str(path)])
    assert not path.with_suffix(".json.partial").exists()
    return code, json.loads(path.read_text())


def rows_by_group(record: dict) -> dict[str, dict[str, dict]]:
    return {
        result["group"]: {row["key"]: row for row in result["rows"]} for result in record["results"]
    }


def test_whole_run_measures_every_group(tmp_path):
    code, record = run_benchmark(tmp_path, "--configs", "tiny,fastmoe_tiny", "--peers", PEERS)
    assert code == 0
    assert record["problems"] == []
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    groups = rows_by_group(record)
    assert set(groups) == {"topk_route", "sort_tokens", "permute", "unpermute", "block", "lane"}
    for name, rows in groups.items():
        assert rows["moeops"]["ours"], name
        for row in rows.values():
            assert row["status"] == "ok", row
            assert row["errors"]
            times = [row[part] for part in ("infer", "forward", "total") if part in row]
            assert times
            for time in times:
                assert 0 < time["p10"] <= time["median"] <= time["p90"]
                assert time["count"] >= 3
    for name in ("topk_route", "permute", "unpermute", "block", "lane"):
        assert "backward" in groups[name]["moeops"], name
    block = groups["block"]["moeops"]
    assert set(block["errors"]) == {"y", "grad_x", "grad_topk_weights", "grad_w_up", "grad_w_down"}
    lane = groups["lane"]["moeops"]
    assert {"y", "grad_x", "grad_gate.gate.weight", "grad_experts.b_up"} <= set(lane["errors"])
    # Recorded times of another machine must not be set against this one.
    assert record["results"][-1]["recorded_elsewhere_ms"] == {}


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
@pytest.mark.parametrize("routing", ["skewed", "one"])
def test_other_routings_and_dtypes(tmp_path, routing, dtype):
    code, record = run_benchmark(
        tmp_path,
        *("--configs", "tiny", "--only", "block", "--peers", "moeops,loop"),
        *("--routing", routing, "--dtype", dtype),
    )
    assert code == 0
    assert (record["routing"], record["dtype"]) == (
        routing,
        {"bf16": "bfloat16", "fp64": "float64"}[dtype],
    )
    assert [row["status"] for row in record["results"][0]["rows"]] == ["ok", "ok"]


def test_transformers_row(tmp_path):
    pytest.importorskip("transformers.integrations.moe")
    code, record = run_benchmark(
        tmp_path, "--configs", "tiny", "--only", "block", "--peers", "transformers,torchtitan"
    )
    assert code == 0
    assert {k: row["status"] for k, row in rows_by_group(record)["block"].items()} == {
        "transformers": "ok",
        "torchtitan": "ok",
    }


GATE_ROWS = (
    "naive",
    "switch",
    "deepseek",
    "expert-choice",
    "soft",
    "hash",
    "zero",
    "naive-compiled",
)
ALONE = ("topk_route-1", "topk_route-2", "topk_route-k", "router")


def test_gates(tmp_path, capsys):
    code, record = run_benchmark(
        tmp_path,
        *("--only", "gates", "--configs", "gates_tiny", "--peers", ",".join((*ALONE, *GATE_ROWS))),
    )
    assert code == 0, record["problems"]
    rows = rows_by_group(record)["gates"]
    assert set(rows) == {*ALONE, *GATE_ROWS}
    assert all(row["status"] == "ok" for row in rows.values())
    for key in ("naive", "switch", "soft", "naive-compiled", "router", "topk_route-2"):
        assert rows[key]["forward"]["median"] > 0
        assert rows[key]["backward"]["median"] > 0
    for key in ("hash", "zero"):
        assert "backward" not in rows[key]
    out = capsys.readouterr().out
    (line,) = [line.split() for line in out.splitlines() if line.startswith("naive ")]
    own = rows["naive"]["forward"]["median"] - rows["router"]["forward"]["median"]
    ratio = max(0.0, own) / rows["topk_route-k"]["forward"]["median"]
    assert float(line[4]) == pytest.approx(ratio, abs=0.01)
    # Both machines side by side, here twice the same.
    assert gates_table.main([str(tmp_path / "out.json")] * 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("T 96, E 16") == 2
    (cells,) = [line.split(" | ") for line in lines if line.startswith("| `SwitchGate`")]
    assert cells[1] == "1"
    assert cells[2] == f"{rows['switch']['forward']['median']:.0f}"
    assert cells[4] == "-"  # not compiled in this run
    assert len(cells) == 10


def test_gates_table_needs_gates(tmp_path, capsys):
    assert gates_table.main([]) == 2
    path = tmp_path / "no_gates.json"
    path.write_text(json.dumps({"machine": {"date": "today"}, "results": []}))
    assert gates_table.main([str(path)]) == 2
    assert "no gates in the run of today" in capsys.readouterr().err


def test_every_gate_is_measured():
    import moeops

    library = {
        name
        for name in moeops.gates.__all__
        if isinstance(gate := getattr(moeops.gates, name), type)
        and issubclass(gate, moeops.gates.BaseGate)
    }
    assert {spec.cls for spec in bench_gates.SPECS.values()} == library - {"BaseGate"}


@pytest.mark.parametrize(
    ("break_it", "error"),
    [
        (lambda ids, weights: (ids, weights.float() * 1.01), "weights: off by"),
        (lambda ids, weights: (ids.flip(0), weights), "ids: .* go elsewhere in float64"),
        (lambda ids, weights: (ids + 99, weights), "ids: out of range"),
        (lambda ids, weights: (ids, weights * float("nan")), "weights: off by nan|not finite"),
    ],
    ids=["weights", "ids", "range", "nan"],
)
def test_wrong_gate_is_refused(monkeypatch, break_it, error):
    import moeops

    class Broken(moeops.gates.NaiveGate):
        def forward(self, inp):
            ids, weights = super().forward(inp)
            everywhere = error == "ids: out of range"
            broken = everywhere or inp.dtype == torch.float32
            return break_it(ids, weights) if broken else (ids, weights)

    monkeypatch.setattr(moeops.gates, "NaiveGate", Broken)
    problem = bench_gates.make(SHAPES_OF_GATES["gates_tiny"], CPU, torch.float32, "uniform")
    with pytest.raises(WrongResult, match=error):
        registry._GROUPS["gates"]["naive"].build(problem).verify()


def broken_block(problem: BlockProblem) -> Case:
    """moeops, but one token's output is off by a factor."""
    case = registry._GROUPS["block"]["moeops"].build(problem)
    factor = torch.ones(problem.shape.num_tokens, 1)
    factor[7] = 1.01
    return Case(lambda: (case.forward()[0] * factor,), case.check, case.leaves, case.grad_outputs)


@pytest.mark.parametrize("ours", [False, True], ids=["baseline", "ours"])
def test_wrong_result_is_refused_and_not_timed(tmp_path, monkeypatch, capsys, ours):
    entry = Entry("loop", "broken", broken_block, ours, ("cpu",))
    monkeypatch.setitem(registry._GROUPS["block"], "loop", entry)
    code, record = run_benchmark(
        tmp_path, "--configs", "tiny", "--only", "block", "--peers", "loop,moeops"
    )
    rows = rows_by_group(record)["block"]
    assert rows["loop"]["status"] == "wrong"
    assert "y: relative error" in rows["loop"]["error"]
    assert not {"infer", "forward", "backward", "total"} & set(rows["loop"])
    assert rows["moeops"]["status"] == "ok"
    assert rows["moeops"]["total"]["count"] >= 3
    assert code == (1 if ours else 0)
    assert len(record["problems"]) == (1 if ours else 0)
    assert "WRONG" in capsys.readouterr().out


def test_failing_baseline_does_not_stop_the_rest(tmp_path, monkeypatch):
    def fails(problem):
        raise ImportError("no such peer")

    monkeypatch.setitem(
        registry._GROUPS["block"], "loop", Entry("loop", "fails", fails, False, ("cpu",))
    )
    code, record = run_benchmark(
        tmp_path, "--configs", "tiny", "--only", "block", "--peers", "loop,moeops"
    )
    rows = rows_by_group(record)["block"]
    assert code == 0
    assert rows["loop"]["status"] == "failed"
    assert rows["loop"]["error"] == "ImportError: no such peer"
    assert rows["moeops"]["status"] == "ok"


def test_wrong_gradient_is_refused():
    problem = make_block(SHAPES["tiny"], CPU, torch.float32, "uniform")
    case = registry._GROUPS["block"]["moeops"].build(problem)
    case.verify()
    honest = case.read_grads

    def wrong_grads():
        case.grads = None
        grads = {name: grad.clone() for name, grad in honest().items()}
        grads["w_down"][2, 3] += 1.0
        return grads

    case.grads = wrong_grads
    with pytest.raises(WrongResult, match="grad_w_down"):
        case.verify()


@pytest.mark.parametrize("routing", ["uniform", "skewed", "one"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_block_reference_is_the_reference_op(routing, activation):
    shape = Shape("case", 33, 12, 10, 5, 3, activation)
    problem = make_block(shape, CPU, torch.float64, routing)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in problem.leaves.items()}
    plan = reference.sort_tokens(problem.topk_ids, shape.num_experts)
    y = reference.moe_mlp(
        leaves["x"],
        plan,
        leaves["topk_weights"],
        leaves["w_up"],
        leaves["w_down"],
        activation=activation,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), problem.grad_y)
    want = {"y": y, **{f"grad_{k}": g for k, g in zip(leaves, grads, strict=True)}}
    got = block_reference(problem)
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value.detach(), msg=name)


@pytest.mark.parametrize("routing", ["uniform", "skewed", "one"])
def test_routing_chooses_distinct_experts(routing):
    shape = Shape("case", 4096, 8, 8, 16, 4)
    ids = choose_experts(shape, routing, CPU)
    assert ids.shape == (4096, 4)
    assert ids.dtype == torch.int64
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    load = torch.bincount(ids.reshape(-1), minlength=16).double() / 4096
    if routing == "uniform":
        assert (load - 0.25).abs().max() < 0.03
    elif routing == "skewed":
        assert load[0] > 3 * load[-1] > 0
    else:
        assert load.tolist() == [1.0] * 4 + [0.0] * 12


def test_compare_catches_one_wrong_row_nan_and_shape():
    want = {"y": torch.randn(4096, 64, dtype=torch.float64)}
    good = {"y": want["y"].to(torch.bfloat16)}
    assert compare(good, want, torch.bfloat16)["y"] < 2e-2
    swapped = good["y"].clone()
    swapped[17] = 0
    with pytest.raises(WrongResult, match="worst row"):
        compare({"y": swapped}, want, torch.bfloat16)
    with_nan = good["y"].clone()
    with_nan[0, 0] = float("nan")
    with pytest.raises(WrongResult, match="nan"):
        compare({"y": with_nan}, want, torch.bfloat16)
    with pytest.raises(WrongResult, match="shape"):
        compare({"y": good["y"][:5]}, want, torch.bfloat16)
    zero = {"y": torch.zeros(3, 2, dtype=torch.float64)}
    assert compare(zero, zero, torch.float64) == {"y": 0.0}
    with pytest.raises(WrongResult, match="inf"):
        compare({"y": zero["y"] + 1}, zero, torch.float64)
    with pytest.raises(WrongResult, match="1 of 3 entries differ"):
        compare_exact({"ids": torch.tensor([1, 2, 3])}, {"ids": torch.tensor([1, 2, 4])})


def test_measure_rotates_keeps_to_the_budget_and_survives_a_failure():
    order: list[str] = []

    def sample(runner: Runner) -> list[float]:
        runner.parts[0]()
        return [1.0]

    def runner(name: str, fail_at: int | None = None) -> Runner:
        def part() -> None:
            order.append(name)
            if fail_at is not None and order.count(name) > fail_at:
                raise RuntimeError("out of order")

        return Runner((part,), lambda: None)

    runners = {"a": runner("a"), "b": runner("b"), "c": runner("c", fail_at=2)}
    with pytest.warns(UserWarning, match="c: failed while it was timed: out of order"):
        samples = measure(runners, sample, repeats=4, budget_seconds=10)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 0}
    assert order[:9] == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]
    few = measure({"a": runner("a")}, sample, repeats=50, budget_seconds=0)
    assert len(few["a"]) == 3


def test_spread_interpolates():
    spread = Spread.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (spread.median, spread.p10, spread.p90, spread.count) == (3.0, 1.4, 4.6, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "nosuch"], "nosuch"),
        (["--only", "everything"], "everything"),
        (["--peers", "nobody"], "nobody"),
        (["--repeats", "1"], "--repeats must be at least 3, got 1"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_profile_names_the_ops(capsys):
    assert profile.main(["--config", "tiny", "--device", "cpu", "--iterations", "2"]) == 0
    out = capsys.readouterr().out
    assert "moeops::moe_mlp_backward_weights" in out
    assert "total" in out


def test_flops_follow_the_convention():
    T, D, H, K = 32768, 2048, 768, 8
    assert SHAPES["qwen3_30b"].flops_total == 18 * T * K * D * H
    gelu = Shape("gelu", T, D, H, 128, K, "gelu")
    assert gelu.flops_forward == 4 * T * K * D * H
