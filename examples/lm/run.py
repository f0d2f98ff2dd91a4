"""From options to a trained model, a picture and a report."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from lm.checkpoint import is_saved
from lm.data import Batches, Corpus, load_corpus, order0_entropy
from lm.errors import UsageError
from lm.gates import warning
from lm.model import ModelConfig
from lm.parallel import Ranks, check_shares, start_ranks
from lm.plots import plot_run
from lm.training import History, Result, StopRequest, TrainConfig, Trainer

EXIT_INTERRUPTED = 130
TEMPERATURE = 0.7
PROMPT_BYTES = 32
PLAIN = "uncompressed"  # the run beside one that encodes rows


def run(options: argparse.Namespace) -> int:
    """Train what the options ask for and report, on as many ranks as there are; returns the exit code."""
    with start_ranks(options.device) as (ranks, device):
        check_shares(
            ranks,
            options.batch,
            options.experts if options.expert_parallel else None,
            options.d_hidden,
            options.expert_tensor_parallel,
        )
        return run_on(ranks, choose_device(device), options)


def run_on(ranks: Ranks, device: torch.device, options: argparse.Namespace) -> int:
    """Run on this rank."""
    corpus = load_corpus(options.text)
    batches = Batches(
        corpus,
        options.batch,
        options.context,
        options.seed,
        device,
        rank=ranks.rank,
        num_ranks=ranks.size,
    )
    order0 = order0_entropy(corpus.held_out)
    make_folder(options.out)
    introduce(ranks, options, corpus, order0)
    names = ["dense"] if options.dense else ["moe"]
    if options.wire is not None:
        names.append(PLAIN)
    if options.compare:
        names.append("dense")
    results = train(names, ranks, device, options, corpus, batches)

    if ranks.is_first:
        write_outputs(options.out, results, order0)
    for name, result in results.items():
        ranks.say(describe(name, result, order0))
    if len(results) < len(names) or not all(result.finished for result in results.values()):
        saved = f"and saved in {options.out}/; the same options with --resume go on"
        ranks.say(f"stopped by Ctrl-C {'and not saved' if options.no_checkpoint else saved}")
        return EXIT_INTERRUPTED
    prompt = bytes(corpus.held_out[: min(PROMPT_BYTES, options.context)].tolist())
    sample = results[names[0]].model.generate(
        prompt, options.sample_bytes, TEMPERATURE, options.seed
    )
    ranks.say(f"--- sample of {names[0]}\n{sample.decode('utf-8', errors='replace')}\n---")
    if options.compare:
        ranks.say(compare(results["moe"], results["dense"]))
    written = [] if options.no_checkpoint else [checkpoint_path(options, n).name for n in names]
    ranks.say(f"wrote {', '.join([*written, 'train_lm.png'])} and metrics.json in {options.out}/")
    return 0


def introduce(ranks: Ranks, options: argparse.Namespace, corpus: Corpus, order0: float) -> None:
    """Say what is trained on, by how many ranks, and what the gate's losses mean."""
    ranks.say(
        f"text: {corpus.num_files} files of {corpus.name}, {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.held_out):,} held out\n"
        f"order-0 entropy of the held-out text: {order0:.3f} bits/byte"
    )
    if ranks.size > 1:
        shards = options.expert_tensor_parallel
        ranks.say(
            f"{ranks.size} ranks, experts {'divided' if options.expert_parallel else 'copied'}"
            + (f", each in {shards} shards" if shards > 1 else "")
        )
    text = None if options.dense else warning(options.gate)
    if text is not None:
        ranks.say(text)


def train(
    names: list[str],
    ranks: Ranks,
    device: torch.device,
    options: argparse.Namespace,
    corpus: Corpus,
    batches: Batches,
) -> dict[str, Result]:
    """Train one model after the other; those behind a stop are missing."""
    windows = batches.held_out(options.eval_batches)
    stop = StopRequest(ranks.size)
    results: dict[str, Result] = {}
    for name in names:
        # The second run of a comparison may not have begun when the first one was stopped.
        resume = options.resume and (name == names[0] or is_saved(checkpoint_path(options, name)))
        trainer = make_trainer(
            options, name, batches, windows, corpus, device, ranks, resume=resume
        )
        total, active = trainer.model.num_parameters()
        ranks.say(
            f"{name}: {total:,} parameters, {active:,} active per token, {device}, "
            f"{'eager' if options.eager else 'torch.compile'}"
            + (f", resumed at step {trainer.step}" if resume else "")
        )
        with stop.listen():
            results[name] = trainer.run(stop)
        if ranks.any(stop.requested, device):
            break
    return results


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"--device must be cpu, cuda or cuda:N, got {name}. Leave it out to choose."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device must exist, got {name} on a machine with {torch.cuda.device_count()} usable CUDA devices. "
            "Use --device cpu."
        )
    return device


def make_folder(path: Path) -> None:
    """Create the folder of results."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UsageError(f"--out must be a folder that can be made, got {path}: {err}.") from err


def checkpoint_path(options: argparse.Namespace, name: str) -> Path:
    """Where the run called ``name`` keeps its checkpoint."""
    return options.out / f"{name}-checkpoint"


def make_trainer(
    options: argparse.Namespace,
    name: str,
    batches: Batches,
    windows: list,
    corpus: Corpus,
    device: torch.device,
    ranks: Ranks,
    *,
    resume: bool,
) -> Trainer:
    """The trainer of the model called ``name``: ``"moe"``, ``"dense"``, or ``PLAIN`` for "moe" without a codec."""
    model_config = ModelConfig(
        gate=None if name == "dense" else options.gate,
        experts=options.experts,
        top_k=options.top_k,
        d_model=options.d_model,
        d_hidden=options.d_hidden,
        layers=options.layers,
        heads=options.heads,
        context=options.context,
        dispatch=options.dispatch,
        capacity=options.capacity,
        shared_expert=options.shared_expert,
        wire=options.wire if name == "moe" else None,
    )
    config = TrainConfig(
        batch=options.batch,
        steps=options.steps,
        lr=options.lr,
        weight_decay=options.weight_decay,
        aux_loss_weight=options.aux_loss_weight,
        dtype=options.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        seed=options.seed,
    )
    return Trainer(
        name,
        model_config,
        config,
        batches,
        windows,
        corpus.fingerprint,
        checkpoint_path(options, name),
        device,
        compiled=not options.eager,
        eval_every=options.eval_every,
        resume=resume,
        saves=not options.no_checkpoint,
        ranks=ranks,
        expert_parallel=options.expert_parallel,
        num_shards=options.expert_tensor_parallel,
    )


def write_outputs(folder: Path, results: dict[str, Result], order0: float) -> None:
    """The picture, and the numbers in it as JSON."""
    plot_run(folder / "train_lm.png", {name: r.history for name, r in results.items()}, order0)
    runs = {
        name: {
            **asdict(result.history),
            "finished": result.finished,
            "tokens_per_second": result.tokens_per_second,
            "start_up_seconds": result.start_up_seconds,
            "graphs": result.graphs,
        }
        for name, result in results.items()
    }
    metrics = {"order0_entropy": order0, "runs": runs}
    (folder / "metrics.json").write_text(json.dumps(metrics) + "\n", encoding="utf-8")


def describe(name: str, result: Result, order0: float) -> str:
    """One line about a run."""
    held_out = result.history.held_out
    text = f"{name}: {len(result.history.train)} steps"
    if held_out:
        text += f", held-out {held_out[-1][1]:.3f} bits/byte (order-0 {order0:.3f})"
    text += f", {result.tokens_per_second:,.0f} tokens/s after a first step of {result.start_up_seconds:.1f} s"
    return text + (f", {result.graphs} compiled graph(s)" if result.graphs else "")


def loss_at(history: History, seconds: float) -> float | None:
    """Held-out loss after that much training, from a straight line between validations; None where none was."""
    losses = dict(history.held_out)
    points = [(time, losses[step]) for step, time in history.seconds]
    if not points or not points[0][0] <= seconds <= points[-1][0]:
        return None
    return float(np.interp(seconds, *zip(*points, strict=True)))


def compare(moe: Result, dense: Result) -> str:
    """What experts bought at equal active FLOPs: at equal steps, and when the faster of the two was done."""
    moe_loss, dense_loss = (result.history.held_out[-1][1] for result in (moe, dense))
    lines = ["             held-out bits/byte   tokens/s   parameters       active"]
    for name, result, loss in (("MoE", moe, moe_loss), ("dense", dense, dense_loss)):
        total, active = result.model.num_parameters()
        lines.append(
            f"{name:12} {loss:18.3f} {result.tokens_per_second:10,.0f} {total:12,} {active:12,}"
        )
    line = f"at equal steps MoE is {_lead(moe_loss, dense_loss)} than dense"
    if moe.tokens_per_second and dense.tokens_per_second:
        line += f", at {moe.tokens_per_second / dense.tokens_per_second:.2f} times its tokens/s"
    lines.append(line)
    seconds = min(result.history.seconds[-1][1] for result in (moe, dense))
    moe_then, dense_then = (loss_at(result.history, seconds) for result in (moe, dense))
    if moe_then is not None and dense_then is not None:
        lines.append(
            f"at equal time, {seconds:.0f} s of training steps, MoE is {_lead(moe_then, dense_then)} than dense"
        )
    return "\n".join(lines)


def _lead(moe: float, dense: float) -> str:
    return f"{abs(dense - moe):.3f} bits/byte {'better' if moe <= dense else 'worse'}"
