"""The main job end to end on a small text, and the README's example."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing

PACKAGES = ("matplotlib", "numpy", "tqdm")  # the extra "examples"
for package in PACKAGES:
    pytest.importorskip(package, reason="needs the extra `examples`")

import train_lm
from lm.data import Batches, load_corpus, order0_entropy
from lm.errors import UsageError
from lm.gates import GATES
from lm.model import GPT, ModelConfig
from lm.run import compare, loss_at
from lm.training import History, Result
from train_lm_cases import ROOT, SCRIPT, read_checkpoint, read_metrics, stop_once_saved

import moeops
from moeops.distributed import save_checkpoint


def test_compiled_run_learns(text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--quick", "--device", "cpu", "--text", text, "--out", out]
    result = subprocess.run(
        [*command, "--steps", "60", "--no-compare"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    metrics = read_metrics(out)
    moe = metrics["runs"]["moe"]
    assert moe["graphs"] == 1  # nothing broke the graph, nothing recompiled
    assert moe["finished"]
    assert len(moe["train"]) == 60
    assert sum(moe["train"][-5:]) < 0.75 * sum(moe["train"][:5])
    assert [step for step, _ in moe["held_out"]] == [20, 40, 60]
    assert moe["held_out"][-1][1] < moe["held_out"][0][1]
    assert moe["tokens_per_second"] > 0
    # Each of two layers shares out its pairs among four experts.
    for _, load in moe["load"]:
        assert [len(layer) for layer in load] == [4, 4]
        assert all(math.isclose(sum(layer), 1, rel_tol=1e-5) for layer in load)
    assert (
        f"order-0 entropy of the held-out text: {metrics['order0_entropy']:.3f} bits/byte"
        in result.stdout
    )
    assert "--- sample of moe\n" in result.stdout
    assert re.search(
        r"bits/byte, [\d,]+ tokens/s, expert load \d+% to \d+%", result.stderr
    )  # the progress bar
    assert (out / "train_lm.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == [
        "metrics.json",
        "moe-checkpoint",
        "train_lm.png",
    ]


def test_comparison_with_dense(quick, tmp_path):
    code, stdout, _ = quick(compare=True)
    assert code == 0
    runs = read_metrics(tmp_path / "out")["runs"]
    moe, dense = runs["moe"], runs["dense"]
    gain = dense["held_out"][-1][1] - moe["held_out"][-1][1]
    word = "better" if gain >= 0 else "worse"
    assert f"at equal steps MoE is {abs(gain):.3f} bits/byte {word} than dense, at " in stdout
    assert dense["load"] == []
    for run in (moe, dense):
        assert [step for step, _ in run["seconds"]] == [step for step, _ in run["held_out"]]
        times = [0, *(seconds for _, seconds in run["seconds"])]
        assert all(before < after for before, after in itertools.pairwise(times))


def test_comparison_at_equal_time():
    """Hand-worked: dense is done after 8 s, when MoE is half-way from 5 to 3 bits."""

    def result(held_out, seconds, tokens_per_second):
        model = SimpleNamespace(num_parameters=lambda: (10, 5))
        history = History(held_out=held_out, seconds=seconds)
        return Result(model, history, True, tokens_per_second, 1.0, 1)

    moe = result([(20, 5.0), (40, 3.0)], [(20, 6.0), (40, 10.0)], 8.0)
    dense = result([(20, 6.0), (40, 4.1)], [(20, 4.0), (40, 8.0)], 10.0)
    assert loss_at(moe.history, 8.0) == 4
    assert loss_at(moe.history, 5.9) is None
    *_, steps, time = compare(moe, dense).splitlines()
    assert steps == (
        "at equal steps MoE is 1.100 bits/byte better than dense, at 0.80 times its tokens/s"
    )
    assert time == "at equal time, 8 s of training steps, MoE is 0.100 bits/byte better than dense"
    early = result([(40, 3.0)], [(40, 10.0)], 8.0)  # not yet looked at when dense was done
    assert "at equal time" not in compare(early, dense)


def test_no_checkpoint(quick, tmp_path):
    options = ("--steps", "2", "--eval-every", "1", "--sample-bytes", "1")
    code, stdout, stderr = quick("--no-checkpoint", *options)
    assert code == 0, stderr
    assert stdout.splitlines()[-1].startswith("wrote train_lm.png and metrics.json in ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train_lm.png", "metrics.json"}


def test_gates_that_see_the_future_are_not_compared(quick, tmp_path):
    options = ("--gate", "soft", "--steps", "2", "--sample-bytes", "1")
    code, stdout, _ = quick(*options, compare=True)
    assert code == 0
    assert "than dense" not in stdout
    assert set(read_metrics(tmp_path / "out")["runs"]) == {"moe"}


@pytest.mark.parametrize(
    "options",
    [
        ["--gate", "naive"],
        ["--gate", "gshard", "--dtype", "bfloat16"],
        ["--gate", "deepseek", "--dtype", "bfloat16"],
        ["--dense"],
        ["--experts", "2,4", "--gate", "switch", "--shared-expert", "residual"],
    ],
    ids=lambda o: "-".join(o).replace("--", ""),
)
def test_gates_and_types(quick, tmp_path, options):
    code, _, stderr = quick(*options)
    assert code == 0, stderr
    (run,) = read_metrics(tmp_path / "out")["runs"].values()
    assert run["held_out"][-1][1] < 7  # 8 bits at the start


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains(quick, tmp_path, gate):
    """A few steps: the loss falls, and what the gate did is in the metrics."""
    options = ("--steps", "6", "--eval-every", "6", "--eval-batches", "1", "--sample-bytes", "4")
    code, stdout, stderr = quick("--gate", gate, *options)
    assert code == 0, stderr
    run = read_metrics(tmp_path / "out")["runs"]["moe"]
    assert run["train"][-1] < run["train"][0]
    assert all(math.isclose(sum(layer), 1, rel_tol=1e-5) for layer in run["load"][-1][1])
    assert all(0 <= share < 1 for share in run["dropped"][-1][1])
    assert all(0 < mean <= 4 for mean in run["experts_per_token"][-1][1])
    assert ("is not causal" in stdout) is (GATES[gate].causal == "no")


# Those with a state, an input or a shape of their own; the others compile as qwen3 does above.
@pytest.mark.parametrize(
    "gate",
    ["hash", "soft", "expert-choice", "remoe", "dense-to-sparse", "deepseek", "base", "llama4"],
)
def test_one_graph_for_every_kind_of_gate(gate):
    torch._dynamo.reset()
    model = GPT(ModelConfig(gate, 4, GATES[gate].top_k or 2, 16, 8, 2, 2, 8))
    monitor = moeops.LoadMonitor(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    losses = torch.compile(model.losses, fullgraph=True, dynamic=False, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        tokens, targets = torch.randint(256, (2, 4, 8))
        loss, auxiliary = losses(tokens, targets)
        (loss + 0.01 * auxiliary).backward()
        optimizer.step()
        moeops.update_gates(model, (step + 1) / 3)
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert all(load.tokens == 3 * 32 for load in monitor.summary().values())
    assert math.isfinite(float(loss.detach()))


def test_every_gate_of_the_library_can_be_chosen():
    library = {
        name
        for name in moeops.gates.__all__
        if isinstance(gate := getattr(moeops.gates, name), type)
        and issubclass(gate, moeops.gates.BaseGate)
    }
    assert {spec.cls for spec in GATES.values()} == library - {"BaseGate"}
    assert len(GATES) == len(library) - 1


def test_help_names_gates_that_see_the_future(capsys):
    with pytest.raises(SystemExit) as stop:
        train_lm.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for gate in ("expert-choice", "soft"):
        assert GATES[gate].causal == "no"
        assert f"{gate}: not causal: experts" in text


def test_deepseek_moves_its_bias_each_step(quick, tmp_path):
    code, _, stderr = quick("--gate", "deepseek", "--steps", "6")
    assert code == 0, stderr
    state = read_checkpoint(tmp_path / "out" / "moe-checkpoint")
    biases = [v for k, v in find_tensors(state) if k.endswith("selection_bias")]
    loads = [v for k, v in find_tensors(state) if k.endswith("gate.loads")]
    assert len(biases) == len(loads) == 2
    for bias in biases:
        steps = bias / 0.001  # the gate's bias_speed
        assert float(steps.abs().max()) > 0.5
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert float(steps.abs().max()) < 6.5
    assert not any(load.any() for load in loads)


def find_tensors(tree, path=""):
    """Path and tensor of every leaf of nested dictionaries."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from find_tensors(value, f"{path}.{key}")


def test_dense_baseline_has_equal_active_parameters():
    sizes = {
        "experts": 8,
        "top_k": 2,
        "d_model": 128,
        "d_hidden": 128,
        "layers": 4,
        "heads": 4,
        "context": 128,
    }
    for options in ({}, {"experts": (2, 4, 8, 8), "shared_expert": "residual"}):
        assert_dense_baseline_has_equal_active_parameters({**sizes, **options})


def assert_dense_baseline_has_equal_active_parameters(sizes):
    moe = GPT(ModelConfig(gate="naive", **sizes))
    dense = GPT(ModelConfig(gate=None, **sizes))
    _, moe_active = moe.num_parameters()
    total, dense_active = dense.num_parameters()
    assert total == dense_active
    experts = [len(block.mlp.experts) for block in moe.blocks]
    assert experts == list(sizes["experts"]) if isinstance(sizes["experts"], tuple) else [8] * 4
    routers = sum(
        p.numel()
        for block in moe.blocks
        for name, p in block.mlp.named_parameters()
        if name.startswith(("gate.", "shared_expert_gate."))
    )
    # Not those of the biases, of which there are more.
    assert abs(moe_active - routers - dense_active) / dense_active < 0.003


def test_ctrl_c_saves_and_resume_gives_the_uninterrupted_run(text, quick, tmp_path):
    code, _, stderr = quick("--steps", "60", out=tmp_path / "whole")
    assert code == 0, stderr
    out = tmp_path / "stopped"
    options = ["--quick", "--eager", "--device", "cpu", "--text", text, "--out", out]
    options += ["--steps", "60", "--no-compare"]
    returncode, stdout, stderr = stop_once_saved([sys.executable, SCRIPT, *options], out)
    assert returncode == 130, stderr
    assert "stopped by Ctrl-C and saved" in stdout
    state = read_checkpoint(out / "moe-checkpoint")
    assert 20 <= state["step"] < 60
    assert len(state["history"]["train"]) == state["step"]
    assert not read_metrics(out)["runs"]["moe"]["finished"]

    code, stdout, stderr = quick("--steps", "60", "--resume", out=out)
    assert code == 0, stderr
    assert f"resumed at step {state['step']}" in stdout
    whole, resumed = (read_metrics(path)["runs"]["moe"] for path in (tmp_path / "whole", out))
    for key in ("train", "held_out", "load"):
        assert resumed[key] == whole[key]
    assert resumed["finished"]


def test_stopped_comparison_goes_on(quick, tmp_path):
    assert quick("--steps", "30")[0] == 0  # as if Ctrl-C had come between the two runs
    code, stdout, stderr = quick("--steps", "30", "--resume", compare=True)
    assert code == 0, stderr
    assert "resumed at step 30" in stdout
    assert len(read_metrics(tmp_path / "out")["runs"]["dense"]["train"]) == 30


def test_a_checkpoint_is_replaced_whole(quick, tmp_path, monkeypatch):
    """A run that fails while it saves leaves the checkpoint of before, from which another goes on."""
    assert quick("--steps", "40", "--eval-every", "20")[0] == 0
    folder = tmp_path / "out" / "moe-checkpoint"
    before = (folder / "checkpoint.json").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        quick("--steps", "40", "--eval-every", "20")
    monkeypatch.undo()
    assert (folder / "checkpoint.json").read_bytes() == before
    assert len(list(folder.glob("data-*"))) == 1
    code, stdout, stderr = quick("--steps", "40", "--resume")
    assert code == 0, stderr
    assert "resumed at step 40" in stdout


def test_files_are_held_out_whole(text):
    corpus = load_corpus(text)
    assert corpus.num_files == 8  # neither the binary, nor the undecodable, nor the hidden file
    parts = bytes(corpus.held_out.tolist()).split(b"\0")
    contents = {path.read_bytes() for path in text.glob("*.py")}
    held_out = set(parts)
    assert held_out < contents
    train = set(bytes(corpus.train.tolist()).split(b"\0"))
    assert not held_out & train
    assert len(held_out | train) == 8
    assert load_corpus(text).fingerprint == corpus.fingerprint


def test_single_file_holds_out_its_end(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(97, 117)) * 100)
    corpus = load_corpus(path)
    assert (len(corpus.train), len(corpus.held_out)) == (1900, 100)


def test_order0_entropy():
    assert order0_entropy(torch.tensor([1, 2, 3, 4] * 5, dtype=torch.uint8)) == pytest.approx(2)
    assert order0_entropy(torch.tensor([7] * 9, dtype=torch.uint8)) == 0


def test_targets_are_one_byte_later_and_steps_are_reproducible(text):
    corpus = load_corpus(text)
    batches = Batches(corpus, batch=3, context=16, seed=5, device=torch.device("cpu"))
    tokens, targets = batches.train(7)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    train = bytes(corpus.train.tolist())
    assert all(bytes(window.tolist()) in train for window in tokens)
    assert torch.equal(batches.train(7)[0], tokens)
    assert not torch.equal(batches.train(8)[0], tokens)
    windows = batches.held_out(4)
    assert bytes(windows[0][0][0].tolist()) == bytes(corpus.held_out[:16].tolist())
    assert bytes(windows[-1][1][-1].tolist()) == bytes(corpus.held_out[-16:].tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--text", "/no/such/path"],
            "--text must be a file or a folder that exists, got /no/such/path",
        ),
        (["--experts", "2", "--top-k", "3"], "--top-k must be at most --experts = 2, got 3"),
        (
            ["--experts", "2,3,4"],
            "--experts must be one number, or one for each of the --layers = 2",
        ),
        (["--experts", "4,2", "--top-k", "3"], "at most the least of --experts = 2, got 3"),
        (["--dense", "--shared-expert", "sum"], "--shared-expert must be left out with --dense"),
        (["--gate", "switch", "--top-k", "2"], "--top-k must be 1 for the switch gate, got 2"),
        (["--d-model", "30"], "--d-model must be a multiple of 2 * --heads = 4, got 30"),
        (["--context", "10000000"], "--text must give more than --context = 10000000 bytes"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--lr", "nan"], "--lr: must be at least 0 and finite, got nan"),
        (["--gate", "best"], "invalid choice: 'best'"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["--device", "cuda:99"], "--device must exist, got cuda:99"),
        (["--resume"], "--resume must find a checkpoint, got none at"),
        (["--out", "/dev/null/x"], "--out must be a folder that can be made, got /dev/null/x"),
        (["--lr", "1e30"], "the loss must stay finite"),
        (["--capacity", "2"], "--capacity must come with --dispatch static, got 2"),
        (["--expert-tensor-parallel", "2"], "--expert-tensor-parallel must come with --expert-pa"),
        (
            ["--wire", "int8"],
            "--wire must come with --expert-parallel and without --dense, got int8",
        ),
        (
            ["--wire", "int8", "--expert-parallel", "--dispatch", "gather"],
            "--wire must come with --dispatch exact or static, got int8 and gather",
        ),
        (["--resume", "--no-checkpoint"], "--resume must come without --no-checkpoint, got both"),
        (["--dense", "--no-compare"], "not allowed with argument --dense"),
    ],
    ids=lambda v: v[0].lstrip("-") if isinstance(v, list) else "",
)
def test_bad_options_end_in_one_line(quick, options, message):
    code, _, stderr = quick(*options)
    assert code == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("train_lm.py: ")]
    assert message in line
    assert "Traceback" not in stderr


def test_empty_text_is_refused(quick, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, stderr = quick("--text", str(tmp_path / "empty"))
    assert code == 2
    assert "--text must hold UTF-8 text, got none" in stderr


def test_other_checkpoints_are_refused(quick, tmp_path):
    assert quick("--steps", "1")[0] == 0
    code, _, stderr = quick("--steps", "1", "--resume", "--d-hidden", "64")
    assert code == 2
    assert "got d_hidden = 64 where" in stderr
    assert "moe-checkpoint has 32" in stderr
    folder = tmp_path / "out" / "moe-checkpoint"
    data = next(folder.glob("data-*/*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    code, _, stderr = quick("--steps", "1", "--resume")
    assert code == 2
    assert "--resume must find a readable checkpoint" in stderr
    assert data.name in stderr
    data.write_bytes(whole)
    (folder / "checkpoint.json").write_bytes(b"nonsense")
    code, _, stderr = quick("--steps", "1", "--resume")
    assert code == 2
    assert "--resume must find a readable checkpoint" in stderr
    save_checkpoint(folder, torch.nn.Linear(2, 2), extra={"step": 1})
    code, _, stderr = quick("--steps", "1", "--resume")
    assert code == 2
    assert "--resume must find a checkpoint of train_lm.py" in stderr


def test_missing_package_is_named(quick, monkeypatch):
    monkeypatch.setattr(train_lm, "NEEDED", ("tqdm", "no_such_package"))
    code, _, stderr = quick()
    assert code == 2
    assert "no_such_package must be installed. Run: pip install 'moeops[examples]'" in stderr


def test_text_must_be_longer_than_the_context(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 30)
    with pytest.raises(UsageError, match=r"more than --context = 32 bytes of held-out text, got 3"):
        Batches(load_corpus(tmp_path), 1, 32, 0, torch.device("cpu"))


def test_readme_example(capsys):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert (
        capsys.readouterr().out
        == "torch.Size([4, 16, 64]) torch.Size([4, 16, 64]) torch.Size([8, 256, 64])\n"
    )
