"""Train FastMoE's example, a Transformer-XL with experts, by `import fmoe`, on text that is already on this machine.

    python examples/transformer_xl.py                 under three minutes on two CPU cores
    python examples/transformer_xl.py --memory 0      the same without memory, to see what memory buys
    python examples/transformer_xl.py --paper         FastMoE's configuration: 12 layers, d 512, 64 experts; for a GPU

Text is read in order, a segment at a time; each layer attends to its segment and to what the layer below held for the
segments before (the memory), by relative positions: Dai et al. 2019, arXiv:1901.02860. A step is one compiled graph;
the memory goes in and comes out. Writes metrics.json into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lm.errors import UsageError
from train_lm import EXIT_USAGE, Parser, check_installed, factor, positive_float, positive_int

BITS = 1 / math.log(2)  # nats to bits
WARM_UP = 0.02  # of the steps
CLIP = 0.25
# FastMoE's script for enwik8, which is the base model of Transformer-XL's paper with experts.
PAPER = {
    "layers": 12,
    "d_model": 512,
    "heads": 8,
    "d_hidden": 1024,
    "experts": 64,
    "top_k": 2,
    "dropout": 0.1,
    "segment": 512,
    "memory": 512,
    "batch": 22,
    "steps": 400_000,
    "lr": 2.5e-4,
    "report_every": 200,
}
QUICK = {
    "layers": 2,
    "d_model": 32,
    "heads": 2,
    "d_hidden": 32,
    "experts": 4,
    "segment": 16,
    "memory": 16,
    "batch": 8,
    "steps": 60,
    "report_every": 30,
}


def make_parser() -> Parser:
    """All options."""
    parser = Parser(
        prog="transformer_xl.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Values in brackets are defaults.",
    )
    add = parser.add_argument
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--paper", action="store_true", help="FastMoE's sizes and steps")
    sizes.add_argument("--quick", action="store_true", help="a tiny model, few steps: seconds")
    add("--gate", choices=("naive", "gshard", "switch"), default="naive", help="[%(default)s]")
    add("--balance-loss-weight", type=factor, default=0.01, help="of the gate's loss [%(default)s]")
    add("--layers", type=positive_int, default=2, help="[%(default)s]")
    add("--d-model", type=positive_int, default=64, help="width [%(default)s]")
    add("--heads", type=positive_int, default=4, help="attention heads [%(default)s]")
    add("--d-hidden", type=positive_int, default=128, help="width of an expert [%(default)s]")
    add("--experts", type=positive_int, default=16, help="per layer [%(default)s]")
    add("--top-k", type=positive_int, default=2, help="experts per token [%(default)s]")
    add("--dropout", type=factor, default=0.0, help="[%(default)s]")
    add("--segment", type=positive_int, default=64, help="bytes per step and stream [%(default)s]")
    add(
        "--memory", type=int, default=64, help="bytes before them that are remembered [%(default)s]"
    )
    add("--batch", type=positive_int, default=16, help="streams of text [%(default)s]")
    add("--steps", type=positive_int, default=1200, help="[%(default)s]")
    add("--lr", type=positive_float, default=4e-3, help="peak learning rate [%(default)s]")
    add("--report-every", type=positive_int, default=200, help="steps [%(default)s]")
    add("--eval-segments", type=positive_int, default=32, help="held-out ones [%(default)s]")
    add("--seed", type=int, default=0, help="[%(default)s]")
    add("--text", type=Path, help="file or folder [Python's own standard library]")
    add("--eager", action="store_true", help="without torch.compile")
    add("--device", help="[cuda where there is one, else cpu]")
    add("--out", type=Path, default=Path("runs/transformer_xl"), help="folder [%(default)s]")
    return parser


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parse, and refuse what does not fit."""
    parser = make_parser()
    for flag, sizes in (("--paper", PAPER), ("--quick", QUICK)):
        if flag in arguments:  # other defaults; what is given still wins
            parser.set_defaults(**sizes)
    options = parser.parse_args(arguments)
    if options.d_model % options.heads or options.d_model % 2:
        raise UsageError(
            f"--d-model must be even and a multiple of --heads = {options.heads}, got {options.d_model}. Change one."
        )
    if options.memory < 0:
        raise UsageError(f"--memory must be at least 0, got {options.memory}. Use 0 for none.")
    if options.gate == "switch" and options.top_k != 1:
        raise UsageError(
            f"--top-k must be 1 for the switch gate, got {options.top_k}. Pass --top-k 1."
        )
    if options.gate == "gshard" and options.top_k != 2:
        raise UsageError(f"--top-k must be 2 for the gshard gate, got {options.top_k}.")
    if options.dropout >= 1:
        raise UsageError(f"--dropout must be below 1, got {options.dropout}. Lower it.")
    if options.top_k > options.experts:
        raise UsageError(
            f"--top-k must be at most --experts = {options.experts}, got {options.top_k}. Lower it."
        )
    return options


@dataclass(frozen=True)
class Report:
    """What is known after some steps.

    Attributes:
        step: how many.
        train: bits per byte of the last steps.
        held_out: bits per byte of held-out text.
        seconds: of training steps, without the first one, which compiles.
    """

    step: int
    train: float
    held_out: float
    seconds: float


def run(options: argparse.Namespace) -> int:
    """Train and report; returns the exit code."""
    import torch
    from lm.data import load_corpus, order0_entropy
    from lm.run import choose_device, make_folder
    from lm.xl import Streams, TransformerXL, XLConfig

    corpus = load_corpus(options.text)
    device = choose_device(options.device)
    make_folder(options.out)
    names = ("layers", "d_model", "heads", "d_hidden", "experts", "top_k", "dropout", "memory")
    config = XLConfig(gate=options.gate, **{name: getattr(options, name) for name in names})
    torch.manual_seed(options.seed)
    try:
        model = TransformerXL(config).to(device)
        train = Streams(corpus.train, options.batch, options.segment, device)
        held_out = Streams(corpus.held_out, options.batch, options.segment, device)
    except ValueError as err:
        raise UsageError(f"the options must fit each other, got: {err}. Change them.") from err
    order0 = order0_entropy(corpus.held_out)
    print(
        f"text: {corpus.name}, {len(corpus.train):,} bytes to train on, order-0 entropy {order0:.3f} bits/byte\n"
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {config.experts} experts per layer, "
        f"{config.top_k} per token, memory {config.memory}, {device}, {'eager' if options.eager else 'torch.compile'}",
        flush=True,
    )
    reports = []
    for report in training(model, train, held_out, options):
        reports.append(report)
        print(
            f"step {report.step}: {report.train:.3f} bits/byte, held-out {report.held_out:.3f}, "
            f"{report.seconds:.0f} s",
            flush=True,
        )
    rate = options.batch * options.segment * (options.steps - 1) / max(reports[-1].seconds, 1e-9)
    print(f"{rate:,.0f} bytes/s; metrics.json is in {options.out}/")
    metrics = {
        "order0_entropy": order0,
        "bytes_per_second": rate,
        "reports": [vars(report) for report in reports],
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics) + "\n", encoding="utf-8")
    return 0


def training(model, train, held_out, options: argparse.Namespace) -> Iterator[Report]:
    """Train step by step; yields a report now and then, and at the end."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    losses = model.losses if options.eager else torch.compile(model.losses, fullgraph=True)
    memory = model.empty_memory(options.batch)
    recent: list = []
    seconds = 0.0
    for step in range(options.steps):
        start = time.perf_counter()
        tokens, targets, fresh = train.segment(step)
        if fresh:  # the streams begin again, and nothing came before
            memory = model.empty_memory(options.batch)
        loss, balance, memory = losses(tokens, targets, memory)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * schedule(step, options.steps)
        optimizer.zero_grad(set_to_none=True)
        (loss + options.balance_loss_weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        recent.append(loss.detach())
        done = step + 1 == options.steps or (step + 1) % options.report_every == 0
        if done:
            mean = float(torch.stack(recent).mean()) * BITS  # waits for the device
        if step > 0:
            seconds += time.perf_counter() - start
        if done:
            if not math.isfinite(mean):
                raise UsageError(
                    f"the loss must stay finite, got {mean} at step {step + 1}. Lower --lr."
                )
            held = model.evaluate(held_out, options.eval_segments) * BITS
            yield Report(step + 1, mean, held, seconds)
            recent.clear()


def schedule(step: int, steps: int) -> float:
    """A factor on the learning rate: linear warm-up, then a cosine to zero."""
    warm = max(1, int(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        check_installed()
        return run(options)
    except UsageError as err:
        print(f"transformer_xl.py: {err}", file=sys.stderr)
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
