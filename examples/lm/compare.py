"""The runs behind compare_gates.py: one per gate and seed, then a table and a picture of all."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lm.checkpoint import is_saved
from lm.data import Batches, Corpus, load_corpus, order0_entropy
from lm.errors import UsageError
from lm.gates import GATES
from lm.model import ModelConfig
from lm.run import EXIT_INTERRUPTED, choose_device, make_folder
from lm.training import StopRequest, TrainConfig, Trainer

LAST = 0.25  # part of the steps that balance and drops are averaged over
MARKS = {
    "yes": "",
    "evaluation": " (b)",
    "no": " (a)",
}
FOOTNOTES = {
    "no": "(a) not causal: the model sees later tokens through its gate. The loss is not comparable with the others.",
    "evaluation": "(b) in training a token's expert depends on the whole batch, in evaluation it does not: the "
    "held-out loss is comparable, the training loss is not.",
}
AUX_LOSS_WEIGHT = 0.01
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Row:
    """One gate over all its seeds; balance and drops over the last quarter of the steps, means over layers and seeds.

    Attributes:
        gate: its name, or ``dense``.
        causal: as in ``GateSpec``.
        top_k: experts per token that the gate is built for.
        experts: per layer.
        d_hidden: width of one expert.
        parameters: all of them.
        active: those that work on one token, for ``top_k`` experts.
        held_out: bits per byte.
        spread: half the range of ``held_out`` over the seeds.
        train: bits per byte, mean of the last quarter.
        max_over_mean: largest expert's load over the mean load.
        dropped: share of the slots without an expert; NaN where the number of experts varies.
        experts_per_token: measured.
        tokens_per_second: of training steps.
    """

    gate: str
    causal: str
    top_k: int
    experts: int
    d_hidden: int
    parameters: int
    active: int
    held_out: float
    spread: float
    train: float
    max_over_mean: float
    dropped: float
    experts_per_token: float
    tokens_per_second: float


def compare(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train what is not trained yet and write the results; returns the exit code."""
    device = choose_device(options.device)
    corpus = load_corpus(options.text)
    make_folder(options.out / "runs")
    order0 = order0_entropy(corpus.held_out)
    stop = StopRequest()
    rows: list[Row] = []
    with stop.listen():
        for name in options.gates:
            runs = []
            for seed in range(options.seeds):
                run = run_one(options, name, seed, corpus, device, stop)
                if run is None:
                    print(
                        f"stopped by Ctrl-C; what is finished is in {options.out}/, the same command goes on"
                    )
                    return EXIT_INTERRUPTED
                runs.append(run)
            rows.append(summarise(name, model_config(options, name), runs))
            print(describe(rows[-1]), flush=True)
    rows = in_order(rows)
    command = shlex.join(["python", "examples/compare_gates.py", *arguments])
    (options.out / "compare_gates.md").write_text(
        markdown(rows, options, order0, device, command), encoding="utf-8"
    )
    write_csv(options.out / "compare_gates.csv", rows)
    plot(options.out / "compare_gates.png", rows)
    print(f"wrote compare_gates.md, compare_gates.csv and compare_gates.png in {options.out}/")
    return 0


def model_config(options: argparse.Namespace, name: str) -> ModelConfig:
    """Sizes of the model with this gate: as much expert width in total, and per token, as every other."""
    experts, top_k, d_hidden = options.experts, options.top_k, options.d_hidden
    only = GATES[name].top_k if name in GATES else None
    if only is not None and only != top_k:
        experts, d_hidden, top_k = experts * only // top_k, d_hidden * top_k // only, only
    return ModelConfig(
        gate=name if name in GATES else None,
        experts=experts,
        top_k=top_k,
        d_model=options.d_model,
        d_hidden=d_hidden,
        layers=options.layers,
        heads=options.heads,
        context=options.context,
    )


def run_one(
    options: argparse.Namespace,
    name: str,
    seed: int,
    corpus: Corpus,
    device: torch.device,
    stop: StopRequest,
) -> dict[str, Any] | None:
    """The record of one run, trained now or found finished; None after Ctrl-C."""
    model = model_config(options, name)
    config = TrainConfig(
        batch=options.batch,
        steps=options.steps,
        lr=options.lr,
        weight_decay=WEIGHT_DECAY,
        aux_loss_weight=AUX_LOSS_WEIGHT,
        dtype="float32",
        seed=seed,
    )
    identity = {
        **asdict(model),
        **asdict(config),
        "text": corpus.fingerprint,
        "device": device.type,
        "compile": options.compile,
        "eval_batches": options.eval_batches,
    }
    path = options.out / "runs" / f"{name}-{seed}.json"
    record = read_finished(path, identity)
    if record is not None:
        return record
    batches = Batches(corpus, options.batch, options.context, seed, device)
    checkpoint = path.with_name(f"{path.stem}-checkpoint")
    make = dict(compiled=options.compile, eval_every=max(1, options.steps // 4))  # fmt: skip

    def trainer(resume: bool) -> Trainer:
        windows = batches.held_out(options.eval_batches)
        return Trainer(
            f"{name} {seed}", model, config, batches, windows, corpus.fingerprint, checkpoint,
            device, resume=resume, **make,
        )  # fmt: skip

    try:
        training = trainer(is_saved(checkpoint))
    except UsageError:  # what was left there is of other options, or damaged
        shutil.rmtree(checkpoint, ignore_errors=True)
        training = trainer(False)
    result = training.run(stop)
    if not result.finished:
        return None
    total, active = result.model.num_parameters()
    record = {
        "identity": identity,
        "parameters": total,
        "active": active,
        "tokens_per_second": result.tokens_per_second,
        **asdict(result.history),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(partial, path)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return record


def read_finished(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """A finished run with these options, None for any other file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("identity") == identity else None


def summarise(name: str, model: ModelConfig, runs: list[dict[str, Any]]) -> Row:
    """Means over the runs of one gate."""

    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else math.nan

    held_out = [run["held_out"][-1][1] for run in runs]
    first = runs[0]
    steps = len(first["train"])
    begin = steps - max(1, round(LAST * steps))

    def late(run: dict[str, Any], key: str) -> list[Any]:
        return [layers for step, layers in run[key] if step > begin]

    dropped = [v for run in runs for layers in late(run, "dropped") for v in layers]
    loads = [
        max(layer) * len(layer) for run in runs for layers in late(run, "load") for layer in layers
    ]
    return Row(
        gate=name,
        causal=GATES[name].causal if name in GATES else "yes",
        top_k=model.top_k if name in GATES else 1,
        experts=model.experts if name in GATES else 1,
        d_hidden=model.d_hidden if name in GATES else model.d_hidden * model.top_k,
        parameters=first["parameters"],
        active=first["active"],
        held_out=mean(held_out),
        spread=(max(held_out) - min(held_out)) / 2,
        train=mean([loss for run in runs for loss in run["train"][begin:]]),
        max_over_mean=mean(loads),
        dropped=math.nan if name in GATES and GATES[name].varies else mean(dropped),
        experts_per_token=mean(
            [v for run in runs for layers in late(run, "experts_per_token") for v in layers]
        ),
        tokens_per_second=mean([run["tokens_per_second"] for run in runs]),
    )


def in_order(rows: list[Row]) -> list[Row]:
    """By held-out loss; gates whose loss is not comparable come last."""
    return sorted(rows, key=lambda row: (row.causal == "no", row.held_out))


def describe(row: Row) -> str:
    """One line as soon as a gate is finished."""
    return (
        f"{row.gate}: held-out {row.held_out:.3f} bits/byte"
        + (f", max/mean load {row.max_over_mean:.2f}" if row.gate in GATES else "")
        + f", {row.tokens_per_second:,.0f} tokens/s"
    )


def cells(row: Row, seeds: int) -> list[str]:
    """A row as text."""
    is_dense = row.gate not in GATES
    spread = f" +- {row.spread:.3f}" if seeds > 1 else ""
    return [
        row.gate + MARKS[row.causal],
        f"1 x {row.d_hidden}" if is_dense else f"{row.top_k} of {row.experts} x {row.d_hidden}",
        f"{row.held_out:.3f}{spread}",
        f"{row.train:.3f}",
        "-" if is_dense else f"{row.max_over_mean:.2f}",
        "-" if math.isnan(row.dropped) else f"{row.dropped:.1%}",
        "-" if is_dense else "all" if row.gate == "soft" else f"{row.experts_per_token:.2f}",
        f"{row.parameters:,}",
        f"{row.tokens_per_second:,.0f}",
    ]


def markdown(
    rows: list[Row], options: argparse.Namespace, order0: float, device: torch.device, command: str
) -> str:
    """The table with what it needs to be read."""
    header = [
        "gate", "experts", "held-out bits/byte", "training bits/byte", "max/mean load", "dropped slots",
        "experts per token", "parameters", "tokens/s",
    ]  # fmt: skip
    lines = [header, ["---"] * len(header), *(cells(row, options.seeds) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [FOOTNOTES[kind] for kind in FOOTNOTES if any(row.causal == kind for row in rows)]
    seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds, +- half their range"
    return "\n".join(
        [
            f"`{command}`",
            "",
            f"{options.steps} steps of {options.batch} x {options.context} bytes, {options.layers} layers, d_model "
            f"{options.d_model}, {seeds}, {device.type}, {torch.get_num_threads()} thread(s), torch "
            f"{torch.__version__}. Order-0 entropy of the held-out text: {order0:.3f} bits/byte. Experts: top "
            "K of E x width, one dense MLP as wide as K experts for comparison. Load, dropped slots "
            f"and experts per token are means over layers and the last {LAST:.0%} of the steps, in training. Where the "
            "number of experts per token varies, K is the average or the most, and an empty slot is not a dropped one.",
            "",
            table,
            "",
            *notes,
            "",
        ]
    )


def write_csv(path: Path, rows: list[Row]) -> None:
    """The same numbers, all digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plot(path: Path, rows: list[Row]) -> None:
    """Three charts side by side: loss, balance, drops."""
    figure = Figure(figsize=(12, 1.4 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    names = [row.gate + MARKS[row.causal] for row in rows]
    places = range(len(rows))
    colors = ["0.75" if row.causal == "no" else "C0" for row in rows]
    for place, row, color in zip(places, rows, colors, strict=True):  # no bars: 0 is far away
        axes[0].errorbar(row.held_out, place, xerr=row.spread, fmt="o", color=color, capsize=3)
    axes[0].set_xlabel("held-out bits per byte (gray: not comparable)")
    axes[0].set_yticks(places, names)
    axes[0].invert_yaxis()
    axes[1].barh(places, [row.max_over_mean for row in rows], color=colors)
    axes[1].axvline(1, color="black", linewidth=0.8)
    axes[1].set_xlabel("largest load over mean load (1 = balanced)")
    axes[2].barh(places, [100 * row.dropped for row in rows], color=colors)
    axes[2].set_xlabel("dropped slots, %")
    for each in axes:
        each.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
