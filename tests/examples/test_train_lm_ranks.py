"""The main job on several ranks: the loss curves of one rank, and checkpoints that any number of them goes on from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

for package in ("matplotlib", "numpy", "tqdm"):  # the extra "examples"
    pytest.importorskip(package, reason="needs the extra `examples`")

from lm.errors import UsageError
from lm.parallel import Ranks, check_shares
from train_lm_cases import SCRIPT, read_checkpoint, read_metrics, stop_once_saved

# In bits per byte, over 60 steps in float32: sums in another order make differences of 1e-6 in the first steps. It
# holds for gates that neither draw random numbers nor limit experts by the tokens of their own rank.
CURVE_TOLERANCE = 1e-3


def torchrun(num_ranks: int, text: Path, out: Path, *options: str) -> list:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [f"--nproc-per-node={num_ranks}", SCRIPT, "--quick", "--no-compare", "--device", "cpu"]
    return [*run, *script, "--text", text, "--out", out, *options]


def assert_same_curves(actual: Path, expected: Path) -> None:
    got, want = (read_metrics(path)["runs"]["moe"] for path in (actual, expected))
    assert got["finished"]
    assert got["train"] == pytest.approx(want["train"], abs=CURVE_TOLERANCE)
    for key in ("held_out", "load", "experts_per_token"):
        assert [step for step, _ in got[key]] == [step for step, _ in want[key]]
    held_out = [[loss for _, loss in metrics["held_out"]] for metrics in (got, want)]
    assert held_out[0] == pytest.approx(held_out[1], abs=CURVE_TOLERANCE)
    for (_, load), (_, wanted) in zip(got["load"], want["load"], strict=True):
        for layers in zip(load, wanted, strict=True):  # which may have different numbers of experts
            torch.testing.assert_close(*map(torch.tensor, layers), rtol=0, atol=5e-3)


@pytest.mark.distributed
def test_two_ranks_stop_and_resume_and_train_what_one_rank_trains(text, quick, tmp_path):
    options = ("--gate", "topk", "--steps", "60")
    assert quick(*options, out=tmp_path / "one")[0] == 0
    out, alone = tmp_path / "two", tmp_path / "alone"
    options = (*options, "--expert-parallel")
    command = torchrun(2, text, out, "--eager", *options, "--expert-tensor-parallel", "2")
    returncode, stdout, stderr = stop_once_saved(command, out)
    assert returncode != 0
    assert "2 ranks, experts divided, each in 2 shards" in stdout, stderr
    assert stdout.count("stopped by Ctrl-C and saved") == 1, stderr
    state = read_checkpoint(out / "moe-checkpoint")
    assert 20 <= state["step"] < 60
    whole = {name: x.shape for name, x in state["model"].items()}
    assert whole["blocks.0.mlp.experts.w_up"] == (4, 64, 32)  # the whole layer
    assert whole["blocks.0.mlp.experts.b_down"] == (4, 32)
    shutil.copytree(out, alone)

    # The other ranks hold whole experts, and the one rank all of them.
    result = subprocess.run(
        torchrun(2, text, out, "--eager", *options, "--resume"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"resumed at step {state['step']}") == 1
    assert_same_curves(out, tmp_path / "one")
    code, stdout, stderr = quick(*options, "--resume", out=alone)  # the file is that of one rank
    assert code == 0, stderr
    assert_same_curves(alone, tmp_path / "one")


PYRAMID = ("--experts", "4,8", "--shared-expert", "sigmoid")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        # Room for every token, so that no rank drops.
        (4, ("--eager", "--expert-parallel", "--dispatch", "static", "--capacity", "4", *PYRAMID)),
        (2, ("--expert-parallel", "--layers", "1", "--dispatch", "gather")),
        (2, ("--eager",)),
        (4, ("--eager", "--expert-parallel", "--expert-tensor-parallel", "2", "--layers", "1")),
    ],
    ids=["4-static", "2-gather-compiled", "2-copies", "4-shards"],
)
def test_ranks_train_what_one_rank_trains(text, quick, tmp_path, num_ranks, options):
    run = ("--gate", "qwen3", "--steps", "20", "--sample-bytes", "4", *options)
    one = [*run, "--expert-tensor-parallel", "1"]  # the last one counts
    assert quick(*one, out=tmp_path / "one")[0] == 0
    result = subprocess.run(
        torchrun(num_ranks, text, tmp_path / "many", *run),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert_same_curves(tmp_path / "many", tmp_path / "one")
    folders = (tmp_path / each / "moe-checkpoint" for each in ("many", "one"))
    models = [read_checkpoint(folder)["model"] for folder in folders]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        # Steps are about 3e-3, whatever the gradient: one that is almost zero may have the other sign.
        torch.testing.assert_close(value, models[1][name], rtol=0, atol=0.02, msg=name)
    metrics = read_metrics(tmp_path / "many")["runs"]["moe"]
    assert metrics["graphs"] == ("--eager" not in options)
    assert all(dropped == [0.0] * len(dropped) for _, dropped in metrics["dropped"])
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [
        "metrics.json",
        "moe-checkpoint",
        "train_lm.png",
    ]


def by_tens(curve: list[float]) -> list[float]:
    return [fmean(curve[i : i + 10]) for i in range(0, len(curve), 10)]


@pytest.mark.distributed
def test_encoded_rows_train_as_well(text, tmp_path):
    """Close to the curve beside it, which is that of rows as they are; the graph of each is one."""
    out = tmp_path / "out"
    options = ("--gate", "qwen3", "--steps", "60", "--layers", "1", "--expert-parallel", "--eager")
    result = subprocess.run(
        torchrun(2, text, out, *options, "--wire", "int8"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    runs = read_metrics(out)["runs"]
    assert list(runs) == ["moe", "uncompressed"]
    coded, plain = (runs[name]["train"] for name in runs)
    assert coded != plain
    # Bits per byte: of ten steps each, and of single ones, of which two are spikes with torch 2.11.
    assert by_tens(coded) == pytest.approx(by_tens(plain), abs=0.03)
    assert coded == pytest.approx(plain, abs=0.05 if torch.__version__ >= (2, 13) else 0.2)
    assert coded[-1] < coded[0] - 1


def test_ranks_need_equal_shares():
    check_shares(Ranks(0, 3), 9, None)
    with pytest.raises(UsageError, match="--experts must be a multiple of the 3 ranks, got 4"):
        check_shares(Ranks(0, 3), 9, 4)
    with pytest.raises(UsageError, match="--batch must be a multiple of the 3 ranks, got 8"):
        check_shares(Ranks(0, 3), 8, 3)
    check_shares(Ranks(0, 4), 8, 6, 8, 2)
    for shares, message in (
        ((8, 6, 8, 3), "--expert-tensor-parallel must divide the 4 ranks, got 3"),
        ((8, 6, 7, 2), "--d-hidden must be a multiple of --expert-tensor-parallel = 2, got 7"),
        ((8, 5, 8, 2), "--experts must be a multiple of the 2 ranks that hold different .* got 5"),
    ):
        with pytest.raises(UsageError, match=message):
            check_shares(Ranks(0, 4), *shares)


@pytest.mark.cuda
@pytest.mark.distributed
def test_nccl(text, quick, tmp_path, cuda_device):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"2 CUDA devices are needed, {torch.cuda.device_count()} are there")
    run = ("--gate", "qwen3", "--steps", "20", "--sample-bytes", "4", "--dtype", "float32")
    run = (*run, "--device", "cuda", "--expert-parallel", "--eager")
    code, _, stderr = quick(*run, out=tmp_path / "one")
    assert code == 0, stderr
    result = subprocess.run(
        torchrun(2, text, tmp_path / "two", *run), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks, experts divided" in result.stdout
    assert_same_curves(tmp_path / "two", tmp_path / "one")
