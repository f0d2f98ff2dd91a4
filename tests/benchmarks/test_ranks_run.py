"""Benchmarks of schedules and of skewed gates on two gloo processes, and the table of what several numbers gave."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.nodes import pretend_nodes
from moeops.cost.laws import Direction, RouterLaw
from moeops.distributed import CostModel

ROOT = Path(__file__).resolve().parents[2]
RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
COMMON = ("--device", "cpu", "--repeats", "2", "--json")
RATES = {"link_bytes_per_second": 1e9, "memory_bytes_per_second": 1e10}
MODEL = CostModel.from_rates(products_per_second=1e9, dtypes=("float32",), **RATES)


def run(*command: object) -> str:
    """Run a benchmark with both ranks; what rank 0 printed."""
    done = subprocess.run(
        [*RUN, *map(str, command)], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_schedules(tmp_path, monkeypatch):
    """All rows have a time; those that a model prices have a prediction; a trace has both sides."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    out, trace = tmp_path / "out.json", tmp_path / "trace.json"
    options = ["--layers", 1, "--dispatch", "exact", "--node-size", 1, "--trace", trace]
    printed = run("benchmarks.schedules", *COMMON, out, *options)
    record = json.loads(out.read_text())
    rows = {row["label"]: row for row in record["rows"]}
    assert list(rows) == [
        *(f"exact, {r} chunks" for r in (1, 2, 4, 8)),
        "exact, chosen",
        *(f"exact in stages, {r} chunks" for r in (1, 2, 4)),
    ]
    assert all(row["spread"]["median"] > 0 and not row["error"] for row in rows.values())
    assert all(row["predicted"] > 0 for label, row in rows.items() if "stages" not in label)
    assert rows["exact, chosen"]["label"] in printed
    assert record["environment"]["NCCL_HOSTID"] == "node0"
    traced = json.loads(trace.read_text())
    for source in ("predicted", "measured"):
        assert all(traced[source][way] for way in ("forward", "backward"))


@pytest.mark.distributed
@pytest.mark.slow
def test_skew(tmp_path):
    """Every result equals the exact dispatcher's, and savings are predicted."""
    MODEL.save(tmp_path / "profile.json")
    out = tmp_path / "out.json"
    printed = run("benchmarks.skew", *COMMON, out, "--profile", tmp_path / "profile.json")
    record = json.loads(out.read_text())["layers"]["tiny"]
    rows = {row["label"]: row for row in record["rows"]}
    assert record["imbalance"] > 1
    assert not any(row["error"] for row in rows.values()), rows
    assert rows["replicas of 2"]["travelling"] == 2
    assert rows["shadowing, at most 1"]["predicted_saving"] >= 0
    assert "gather" in rows
    assert "saves ms" in printed


def test_scaling(tmp_path, capsys):
    """Both tables of two files, with the prediction of each row."""
    profile = tmp_path / "profile.json"
    law = RouterLaw(1e-5, 0.0, 0.0, 0.0)
    dataclasses.replace(MODEL, router={"float32": Direction(law, law)}).save(profile)
    files = []
    for size, seconds in ((2, 3e3), (4, 2e3)):
        rows = [
            {"shape": "tiny", "mode": "eager", "label": label, "forward": {"median": total / 3},
             "total": {"median": total}, "speedup_total": 1.5}
            for label, total in (("one rank", 5e3), ("exact", seconds), ("gather", 2 * seconds))
        ]  # fmt: skip
        record = {"ranks": size, "dtype": "float32", "tokens_per_rank": [48], "layers": rows}
        files.append(tmp_path / f"{size}.json")
        files[-1].write_text(json.dumps(record))
    command = ["--profile", str(profile), "--measured", *map(str, files)]
    assert scaling.main(command) == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("tiny exact"))
    assert [float(cell) for cell in (line.split()[3], line.split()[6])] == [3.0, 2.0]
    assert "tiny, 4 ranks" in printed
    assert "4 ranks are more than 2 experts per token" in printed
    profile.write_text("{")
    assert scaling.main(command) == 2
    assert "scaling: CostModel.load" in capsys.readouterr().err


def test_nodes_of_two_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    for name in ("NCCL_HOSTID", "NCCL_NET", "NCCL_IB_DISABLE", "NCCL_SOCKET_NTHREADS",
                 "NCCL_NSOCKS_PERTHREAD", "NCCL_MNNVL_ENABLE"):  # fmt: skip
        monkeypatch.setenv(name, "x")  # restored afterwards
        monkeypatch.delenv(name)
    found = pretend_nodes(2)
    assert found["NCCL_HOSTID"] == "node1"
    assert found["NCCL_SOCKET_IFNAME"] == "eth0"
    assert found["NCCL_NET"] == "Socket"
