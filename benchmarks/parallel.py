"""Expert parallelism, measured: ``torchrun --nproc-per-node=2 -m benchmarks.parallel [--device cpu|cuda]``.

First the exchange of rows beside torch's own all-to-all, then layers, forward and forward + backward, against the same
layer with all experts on one rank. Every result is checked before it is timed. All ranks begin a sample together (CUDA
events behind a barrier), and the slowest rank's time counts. Rank 0 prints the tables and writes JSON; a row that
fails says why in its place. After --seconds the tables are printed as they are, whatever hangs. Exit code 1 when a row
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import bench_exchange, bench_parallel, machine, rank_jobs
from benchmarks.bench_exchange import ExchangeRow
from benchmarks.bench_parallel import (
    BY_PAIR,
    DISPATCHES,
    ONE_RANK,
    PEER,
    LayerProblem,
    LayerRow,
)
from benchmarks.ranks import Ranks, RankTimer, attempt

MODES = ("eager", "compiled")
# What is compiled first: a compilation takes seconds, and the time may run out.
COMPILED_ORDER = (
    "exact",
    "gather",
    ONE_RANK,
    "gather, 1.25 rows",
    PEER,
    "static",
    BY_PAIR,
    "exact, 2 chunks",
    "exact, 4 chunks",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with their defaults filled in for the device."""
    parser = rank_jobs.parser_of("parallel", __doc__, 2)
    parser.add_argument("--configs", help="comma list; default: qwen3_30b,mixtral_8x7b; cpu: tiny")
    parser.add_argument("--only", choices=("exchange", "layers"), help="default: both")
    parser.add_argument("--labels", help="list with ; of the layers' rows; default: all")
    parser.add_argument("--modes", default=",".join(MODES), help="default: eager,compiled")
    parser.add_argument("--repeats", type=int, default=12, help="samples, default 12")
    parser.add_argument("--seconds", type=float, default=140, help="for everything, default 140")
    args = rank_jobs.parse(parser, "parallel", argv)
    args.configs = rank_jobs.shapes_of(parser, args, "configs")
    args.modes = args.modes.split(",")
    # Ranks read each other's memory on GPUs only.
    labels = [label for label, _ in DISPATCHES if args.device == "cuda" or label != PEER]
    args.labels = labels if args.labels is None else args.labels.split(";")
    if not set(args.labels) <= set(labels):
        parser.error(f"--labels must be from {labels}, got {args.labels}")
    if not set(args.modes) <= set(MODES):
        parser.error(f"--modes must be from {MODES}, got {args.modes}")
    if args.repeats < 10:
        parser.error(f"--repeats must be at least 10, got {args.repeats}")
    return args


class Session:
    """One run on all ranks; rank 0 prints and writes."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.begin = time.monotonic()
        self.exchange: list[ExchangeRow] = []
        self.layers: list[LayerRow] = []
        self.problems: list[str] = []
        self.current = "start"
        self._finishing = threading.Lock()
        self.rank = int(os.environ.get("RANK", "0"))
        self.record: dict[str, Any] = {}
        # A rank that waits for one that failed waits in a collective: only another thread can still speak.
        # Rank 0 first, because torchrun ends all ranks as soon as one has ended.
        self._alarm = threading.Timer(args.seconds + (0 if self.rank == 0 else 5), self._give_up)
        self._alarm.daemon = True
        self._alarm.start()
        self.ranks = Ranks(args.device, args.seconds)
        device = self.ranks.device
        self.record = {
            "machine": machine.describe(device, args.commit),
            "ranks": self.ranks.size,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if args.device == "cuda" else None,
            "environment": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
            "dtype": "bfloat16" if args.device == "cuda" else "float32",
            "tokens_per_rank": [shape.num_tokens for shape in args.configs],
            "repeats": args.repeats,
            "command": ["torchrun", f"--nproc-per-node={self.ranks.size}", "-m",
                        "benchmarks.parallel", *sys.argv[1:]],
            "units": {"times": "microseconds", "memory": "bytes"},
        }  # fmt: skip

    def run(self) -> int:
        """Everything that was asked for; the exit code."""
        info = {**self.record["machine"], "nccl": self.record["nccl"], "ranks": self.ranks.size}
        self.say(" ".join(f"{k}={v}" for k, v in info.items() if v is not None))
        if self.args.only != "layers":
            self._run_exchange()
        if self.args.only != "exchange":
            self._run_layers()
        self._alarm.cancel()
        if self.rank == 0 and self._finishing.acquire(blocking=False):
            self._finish()
        self.ranks.close()
        return 1 if self.problems else 0

    def _run_exchange(self) -> None:
        on_cuda = self.args.device == "cuda"
        # About 3 ms of other work before a sample, in which the host queues all of it: device time is measured.
        timer = RankTimer(self.ranks, lead_passes=24 if on_cuda else 1)
        for num_bytes in bench_exchange.CUDA_SIZES if on_cuda else bench_exchange.TEST_SIZES:
            row = ExchangeRow(num_bytes, self.ranks.size)
            if self._skip(row, f"exchange of {num_bytes} bytes"):
                continue
            measured, row.error = attempt(
                self.ranks,
                lambda n=num_bytes: bench_exchange.measure(self.ranks, timer, n, self.args.repeats),
            )
            if measured is not None:
                row.times, row.host = measured
            self._done(row)
        self.say(bench_exchange.exchange_table(self.exchange) + "\n")

    def _run_layers(self) -> None:
        dtype = getattr(torch, self.record["dtype"])
        # As benchmarks.run: more work than a forward needs to be queued.
        timer = RankTimer(self.ranks, lead_passes=12 if self.args.device == "cuda" else 1)
        counts = False
        if self.args.device == "cuda":
            counts, error = attempt(
                self.ranks, lambda: bench_parallel.copy_counter_works(self.ranks.device)
            )
            if not counts:
                self.say(f"copies to the host are not counted: the profiler sees none {error}")
        problems: dict[str, LayerProblem] = {}
        failures: dict[str, str] = {}
        for shape in self.args.configs:
            problems[shape.name], failures[shape.name] = attempt(
                self.ranks, lambda s=shape: LayerProblem(s, self.ranks, dtype)
            )
        options = dict(DISPATCHES)
        plan = [("eager", shape, label) for shape in self.args.configs for label in options]
        plan += [
            ("compiled", shape, label) for label in COMPILED_ORDER for shape in self.args.configs
        ]
        for mode, shape, label in plan:
            if mode not in self.args.modes or label not in self.args.labels:
                continue
            row = LayerRow(
                shape.name,
                label,
                mode,
                flops_forward=shape.flops_forward,
                flops_total=shape.flops_total,
            )
            if self._skip(row, f"{shape.name} {label}, {mode}"):
                continue
            problem, row.error = problems[shape.name], failures[shape.name]
            if problem is not None:
                _, row.error = attempt(
                    self.ranks,
                    lambda r=row, p=problem: bench_parallel.measure_row(
                        p, r, options[r.label], timer, self.args.repeats
                    ),
                )
                bench_parallel.release(self.ranks.device)
            if not counts:
                row.copies_to_host = None
            if row.error:
                row.forward = row.total = None
            self._done(row)

    def _skip(self, row: ExchangeRow | LayerRow, label: str) -> bool:
        """Announce a row, or say that there is no time left for it; all ranks agree."""
        self.current = label
        late = time.monotonic() - self.begin > self.args.seconds - 3
        if any(self.ranks.gather(late)):
            row.error = f"skipped: the {self.args.seconds:g} s were used up"
            self._done(row)
            return True
        return False

    def _done(self, row: ExchangeRow | LayerRow) -> None:
        """Keep a row, and the file up to date."""
        if isinstance(row, ExchangeRow):
            self.exchange.append(row)
        else:
            self.layers.append(row)
            state = row.error or ", ".join(f"{k} {v:.1e}" for k, v in row.errors.items())
            self.say(f"  {time.monotonic() - self.begin:5.1f} s  {self.current}: {state}")
        if row.error:
            self.problems.append(f"{self.current}: {row.error}")
        self._write()

    def _finish(self) -> None:
        """Print and write what there is."""
        bench_parallel.add_speedups(self.layers, self.ranks.size)
        if self.layers:
            order = {label: place for place, (label, _) in enumerate(DISPATCHES)}
            names = [shape.name for shape in self.args.configs]
            self.layers.sort(
                key=lambda r: (names.index(r.shape), MODES.index(r.mode), order[r.label])
            )
            self.say(bench_parallel.layer_table(self.layers))
        self._write()
        self.say(f"\nwritten to {self.args.json}, {time.monotonic() - self.begin:.1f} s")
        for problem in self.problems:
            self.say(f"PROBLEM {problem}")

    def _give_up(self) -> None:
        """The time is over: print what there is and end, although this rank is in the middle of something."""
        if not self._finishing.acquire(blocking=False):
            return
        try:
            self.problems.append(f"{self.current}: not finished after {self.args.seconds:g} s")
            if self.rank == 0 and hasattr(self, "ranks"):
                if self.exchange and not self.layers:
                    self.say(bench_exchange.exchange_table(self.exchange))
                self._finish()
            elif self.rank == 0:
                self.say(f"PROBLEM {self.problems[-1]}")
        finally:
            os._exit(1)

    def _write(self) -> None:
        """The file is whole at any time."""
        if self.rank != 0:
            return
        record = {
            **self.record,
            "exchange": [row.as_json() for row in self.exchange],
            "layers": [row.as_json() for row in self.layers],
            "problems": self.problems,
        }
        path = self.args.json
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + ".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(partial, path)

    def say(self, text: str) -> None:
        """Rank 0 prints, at once."""
        if self.rank == 0:
            print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 when a row failed."""
    return Session(parse(argv)).run()


if __name__ == "__main__":
    sys.exit(main())
