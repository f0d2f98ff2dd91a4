"""The comparison of gates end to end on a tiny model: equal cost, its table, going on where it stopped."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest

for package in ("matplotlib", "numpy", "tqdm"):
    pytest.importorskip(package, reason="needs the extra `examples`")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import compare_gates
from lm import compare
from lm.gates import GATES
from lm.model import GPT
from lm.training import Trainer

TINY = [
    "--d-model", "16", "--d-hidden", "8", "--experts", "4", "--layers", "1", "--heads", "2", "--context", "16",
    "--batch", "4", "--eval-batches", "2", "--steps", "12", "--device", "cpu", "--text", str(EXAMPLES / "lm"),
]  # fmt: skip


@pytest.fixture
def run(tmp_path, capsys):
    def call(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = compare_gates.main([*TINY, "--out", str(tmp_path / "out"), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def read_csv(tmp_path):
    with (tmp_path / "out" / "compare_gates.csv").open(newline="") as file:
        return {row["gate"]: row for row in csv.DictReader(file)}


def test_table_and_picture(run, tmp_path):
    code, _, stderr = run("--gates", "switch,expert-choice,naive", "--seeds", "2")
    assert code == 0, stderr
    rows = read_csv(tmp_path)
    assert set(rows) == {"dense", "naive", "switch", "expert-choice"}
    assert list(rows)[-1] == "expert-choice"  # whose loss is not comparable
    comparable = [float(row["held_out"]) for row in rows.values()][:-1]
    assert comparable == sorted(comparable)
    assert 1 <= float(rows["naive"]["max_over_mean"]) <= 4
    assert float(rows["naive"]["dropped"]) == 0
    assert 0 < float(rows["switch"]["dropped"]) < 0.5
    assert float(rows["expert-choice"]["max_over_mean"]) == pytest.approx(1)
    assert rows["expert-choice"]["causal"] == "no"
    # The mean of two runs, and half their range.
    losses = [
        json.loads((tmp_path / "out" / "runs" / f"naive-{seed}.json").read_text())["held_out"][-1][
            1
        ]
        for seed in (0, 1)
    ]
    assert losses[0] != losses[1]
    assert float(rows["naive"]["held_out"]) == pytest.approx(sum(losses) / 2)
    assert float(rows["naive"]["spread"]) == pytest.approx(abs(losses[0] - losses[1]) / 2)
    text = (tmp_path / "out" / "compare_gates.md").read_text()
    assert "--gates switch,expert-choice,naive --seeds 2" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| switch")]
    assert f"| 1 of 2 x 16 | {float(rows['switch']['held_out']):.3f} +- " in line
    assert "| expert-choice (a) |" in text
    assert "(a) not causal" in text
    assert "(b)" not in text
    assert (tmp_path / "out" / "compare_gates.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out" / "runs").glob("*-checkpoint"))


def test_finished_runs_are_kept(run, tmp_path, monkeypatch):
    assert run("--gates", "naive")[0] == 0
    first = read_csv(tmp_path)
    trained = []
    real = Trainer.run
    monkeypatch.setattr(
        Trainer, "run", lambda self, stop: trained.append(self._name) or real(self, stop)
    )
    assert run("--gates", "naive,switch")[0] == 0
    assert trained == ["switch 0"]
    assert read_csv(tmp_path)["naive"] == first["naive"]
    assert run("--gates", "naive", "--lr", "1e-3")[0] == 0  # other options: not the same run
    assert trained[1:] == ["dense 0", "naive 0"]


def test_ctrl_c_goes_on_in_the_middle(run, tmp_path, monkeypatch):
    whole = run("--gates", "naive")
    assert whole[0] == 0
    want = (tmp_path / "out" / "runs" / "naive-0.json").read_text()
    (tmp_path / "out" / "runs" / "naive-0.json").unlink()
    real = Trainer.run

    def interrupted(self, stop):
        train_step = self._train_step

        def step(losses):
            train_step(losses)
            stop.requested = self.step >= 5

        self._train_step = step
        return real(self, stop)

    monkeypatch.setattr(Trainer, "run", interrupted)
    code, stdout, _ = run("--gates", "naive")
    assert code == 130
    assert "the same command goes on" in stdout
    assert (tmp_path / "out" / "runs" / "naive-0-checkpoint").exists()
    monkeypatch.setattr(Trainer, "run", real)
    assert run("--gates", "naive")[0] == 0
    got = json.loads((tmp_path / "out" / "runs" / "naive-0.json").read_text())
    for key in ("train", "held_out", "load"):
        assert got[key] == json.loads(want)[key]


def test_all_gates_cost_the_same():
    """Expert parameters, in total and per token, but for the biases of more or fewer experts."""
    options = compare_gates.parse_options(["--d-hidden", "256"])
    sizes = {}
    for name in options.gates:
        config = compare.model_config(options, name)
        model = GPT(config)
        if name in GATES:
            assert config.top_k * config.d_hidden == 2 * 256
            assert config.experts * config.d_hidden == 8 * 256
            gates = sum(p.numel() for block in model.blocks for p in block.mlp.gate.parameters())
            total, active = model.num_parameters()
            sizes[name] = (total - gates, active - gates)
        else:
            dense = model.num_parameters()[0]
    for name, (total, active) in sizes.items():
        assert total == pytest.approx(sizes["naive"][0], rel=2e-3), name
        assert active == pytest.approx(dense, rel=2e-3), name


def test_summary_by_hand():
    options = compare_gates.parse_options(["--gates", "naive"])
    run = {
        "train": [9.0, 9.0, 9.0, 2.0],
        "held_out": [[2, 5.0], [4, 3.0]],
        "load": [[3, [[1.0] + [0.0] * 7]], [4, [[0.25] + [0.75 / 7] * 7, [0.125] * 8]]],
        "dropped": [[3, [1.0]], [4, [0.1, 0.3]]],
        "experts_per_token": [[3, [1.0]], [4, [2.0, 1.5]]],
        "parameters": 10,
        "active": 5,
        "tokens_per_second": 100.0,
    }
    row = compare.summarise("naive", compare.model_config(options, "naive"), [run])
    assert (row.held_out, row.spread, row.train) == (3, 0, 2)
    assert (row.max_over_mean, row.dropped, row.experts_per_token) == (1.5, 0.2, 1.75)
    assert re.match(
        r"naive: held-out 3\.000 bits/byte, max/mean load 1\.50, 100 tokens/s",
        compare.describe(row),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gates", "best"], "--gates must be a comma list of naive, switch,"),
        (["--experts", "2", "--top-k", "3"], "--top-k must be at most --experts = 2, got 3"),
        (
            ["--gates", "switch", "--experts", "5"],
            "multiple of --top-k = 2 for the switch gate, got 5",
        ),
        (
            ["--d-model", "20", "--heads", "4"],
            "--d-model must be a multiple of 2 * --heads = 8, got 20",
        ),
        (["--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["--text", "/no/such/path"], "--text must be a file or a folder that exists"),
    ],
    ids=lambda v: v[0].lstrip("-") if isinstance(v, list) else "",
)
def test_bad_options_end_in_one_line(run, options, message):
    code, _, stderr = run(*options)
    assert code == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("compare_gates.py: ")]
    assert message in line
