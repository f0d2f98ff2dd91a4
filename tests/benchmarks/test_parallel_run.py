"""benchmarks.parallel on two gloo processes, where two rows fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Static dispatch cannot run, and one layer computes something else: both rows say so, and the others are measured.
LABELS = ["one rank", "exact, by pair", "exact", "gather", "static", "exact, 4 chunks"]
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from benchmarks import bench_parallel, parallel
measure_row = bench_parallel.measure_row

def fail(problem, row, *args):
    if row.label == "static":
        raise RuntimeError("no room")
    if row.label == "exact, 4 chunks":
        problem.grad_y.mul_(2)  # behind the reference's back
    measure_row(problem, row, *args)

bench_parallel.measure_row = fail
sys.exit(parallel.main(sys.argv[1:]))
"""


# The second run never ends by itself.
EACH = """
import sys
sys.path.insert(0, {root!r})
from benchmarks import parallel_each
run = parallel_each.run_ranks

def hang(command, seconds):
    if "static" in command[command.index("--labels") + 1]:
        return run([sys.executable, "-c", "import time; time.sleep(99)"], 5)
    return run(command, seconds)

parallel_each.run_ranks = hang
sys.exit(parallel_each.main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_two_ranks_report_every_row(tmp_path):
    program, out = tmp_path / "program.py", tmp_path / "out.json"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    options = ["--device", "cpu", "--modes", "eager", "--seconds", "60", "--json", out]
    options += ["--labels", ";".join(LABELS)]
    result = subprocess.run(
        [*RUN, program, *options],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert result.returncode != 0
    record = json.loads(out.read_text())
    assert record["ranks"] == 2
    assert record["machine"]["torch"]
    for row in record["exchange"]:
        assert set(row["times"]) == {"moeops", "torch, splits", "torch, equal"}
        assert row["ratio"] > 0
        best = max(row["gbps"]["torch, splits"], row["gbps"]["torch, equal"])
        assert row["ratio"] == pytest.approx(row["gbps"]["moeops"] / best)
    rows = {row["label"]: row for row in record["layers"]}
    assert list(rows) == LABELS
    assert "RuntimeError: no room" in rows["static"]["error"]
    assert "WrongResult: grad_x: relative error" in rows["exact, 4 chunks"]["error"]
    for label in ("static", "exact, 4 chunks"):
        assert "total" not in rows[label]
    one, exact = rows["one rank"], rows["exact"]
    assert exact["forward"]["count"] >= 10
    assert exact["total"]["median"] > exact["forward"]["median"] > 0
    speedup = 2 * one["total"]["median"] / exact["total"]["median"]
    assert exact["speedup_total"] == pytest.approx(speedup)
    assert len(record["problems"]) == 2
    assert "FAILED tiny static, eager: rank 0: RuntimeError: no room" in result.stdout
    assert result.stdout.count("MiB per rank") == 1


@pytest.mark.distributed
def test_each_dispatcher_has_its_own_time(tmp_path):
    """One that hangs is killed, and the others are measured."""
    program = tmp_path / "each.py"
    program.write_text(EACH.format(root=str(ROOT)))
    options = ["--labels", "gather;static", "--configs", "tiny", "--seconds", "20"]
    options += ["--folder", tmp_path, "--", "--device", "cpu", "--modes", "eager"]
    result = subprocess.run(
        [sys.executable, program, *options],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=ROOT,
    )
    assert result.returncode == 1, result.stderr
    assert "PROBLEM tiny static: killed after 5 s" in result.stdout
    last = result.stdout.rpartition("layer")[2]
    assert re.search(r"tiny gather +eager( +[\d.e-]+){6}", last), result.stdout
