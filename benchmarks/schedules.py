"""Training steps by schedule: ``torchrun --nproc-per-node=4 -m benchmarks.schedules [--node-size 2] [--device cpu]``.

A model of layers with attention and experts, whose dense gradients are averaged over all ranks. Its experts work in one
chunk, in fixed numbers of chunks, and in those that the cost model of this job chooses, which it measures first; with
--compiled also in one graph, with slices of the gradients beside the experts. With --node-size NCCL takes as many
neighbouring ranks for a machine, with sockets on the loopback device between ("emulated"), and the exchange in stages
is a row too. Every schedule's loss is compared with that of one chunk. Times are of whole steps, the slowest rank's by
the host's clock, beside what the cost model predicts: the step without experts as measured, the experts' pipelines,
and the all-reduce. Exit code 1 when a row failed.

T tokens of a rank, D model width, W ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import moeops
from benchmarks import machine, rank_jobs, shapes
from benchmarks.nodes import pretend_nodes
from benchmarks.ranks import Ranks, attempt
from benchmarks.report import table
from benchmarks.timing import Spread, synchronize
from moeops.comm.groups import rank_group
from moeops.cost.model import CostModel
from moeops.cost.schedule import Schedule
from moeops.cost.slices import plan_slices
from moeops.dispatch.base import Dispatcher
from moeops.dispatch.degrees import Degrees
from moeops.distributed import (
    AutoChunks,
    DistributedGroupedDataParallel,
    Exact,
    Gather,
    build_hierarchy,
)
from moeops.profiling.job import JobLayer, job_model

DEGREES = (1, 2, 4, 8)
HIERARCHY_DEGREES = (1, 2, 4)
# Gates at random are balanced, and what they make of tokens of deeper layers is not.
DISPATCHES = {
    "exact": Exact,
    "gather": functools.partial(Gather, rows=2.0),
    "peer": functools.partial(Gather, rows=2.0, transport="peer"),  # on GPUs of one node
}
COMPILED = ("first", "chosen", "slices")
HEAD = 128  # columns of a head of attention
CLOSE = 2e-2  # relative: a loss is a sum of rounded numbers
WARM_UP = 2


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with their defaults filled in for the device."""
    parser = rank_jobs.parser_of("schedules", __doc__, 4)
    parser.add_argument("--node-size", type=int, help="ranks per emulated node; default: one node")
    parser.add_argument("--config", help="sizes of the experts; default: mixtral_8x7b; cpu: tiny")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="of a sequence, at most")
    parser.add_argument("--dispatch", default="exact,gather", help="default: exact,gather")
    parser.add_argument("--compiled", help=f"rows in one graph, of {','.join(COMPILED)}")
    parser.add_argument("--repeats", type=int, default=8, help="samples, default 8")
    parser.add_argument("--seconds", type=float, default=120, help="no row begins later")
    parser.add_argument("--trace", type=Path, help="write one layer's kernels there, as JSON")
    args = rank_jobs.parse(parser, "schedules", argv)
    (args.shape,) = rank_jobs.shapes_of(parser, args, "config", ("mixtral_8x7b",))
    args.dispatch = args.dispatch.split(",")
    if not set(args.dispatch) <= set(DISPATCHES):
        parser.error(f"--dispatch must be from {tuple(DISPATCHES)}, got {args.dispatch}")
    args.compiled = args.compiled.split(",") if args.compiled else []
    if not set(args.compiled) <= set(COMPILED):
        parser.error(f"--compiled must be from {COMPILED}, got {args.compiled}")
    return args


class Layer(nn.Module):
    """Attention, then experts, each on normalised tokens and added to them."""

    def __init__(self, shape: shapes.Shape, length: int, moe: nn.Module, **kind: Any) -> None:
        super().__init__()
        width = shape.d_model
        self.length, self.heads = length, max(1, width // HEAD)
        self.norms = nn.ModuleList([nn.RMSNorm(width, **kind) for _ in range(2)])
        self.qkv = nn.Linear(width, 3 * width, bias=False, **kind)
        self.out = nn.Linear(width, width, bias=False, **kind)
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[T, D]``, a whole number of sequences."""
        qkv = self.qkv(self.norms[0](x)).view(
            -1, self.length, 3, self.heads, x.shape[1] // self.heads
        )
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.moe(self.norms[1](x))


class GateOnly(nn.Module):
    """What is left of a layer with experts without exchange and experts."""

    def __init__(self, moe: moeops.FMoETransformerMLP) -> None:
        super().__init__()
        self.gate = moe.gate

    def forward(self, x: Tensor) -> Tensor:
        """One number per token, so that the gate has gradients."""
        return self.gate(x)[1].sum(1, keepdim=True).to(x.dtype)


@dataclasses.dataclass
class Row:
    """One schedule; what was measured is in microseconds, what was predicted in seconds."""

    label: str
    degrees: tuple[int, int]
    predicted: float | None = None
    spread: Spread | None = None
    loss: float | None = None
    error: str = ""


class Setting(NamedTuple):
    """What a model is built from."""

    args: argparse.Namespace
    ranks: Ranks
    x: Tensor
    kind: dict[str, Any]


def build(
    setting: Setting, dispatch: Any, in_graph: bool = False
) -> DistributedGroupedDataParallel:
    """The model, the same numbers every time."""
    args, ranks = setting.args, setting.ranks
    shape = args.shape
    length = next(
        n for n in range(min(args.length, shape.num_tokens), 0, -1) if shape.num_tokens % n == 0
    )
    layers = []
    for number in range(args.layers):
        torch.manual_seed(number)
        moe = rank_jobs.build_layer(
            shape,
            shape.num_experts // ranks.size,
            gate=moeops.gates.NaiveGate,
            world_size=ranks.size,
            dispatch=dispatch,
            **setting.kind,
        )
        layers.append(Layer(shape, length, moe, **setting.kind))
    return DistributedGroupedDataParallel(nn.Sequential(*layers), in_graph=in_graph)


def dispatchers(model: nn.Module) -> list[Dispatcher]:
    """Of all layers with experts."""
    return [m.dispatcher for m in model.modules() if isinstance(m, moeops.FMoETransformerMLP)]


def step_of(
    setting: Setting,
    model: DistributedGroupedDataParallel,
    call: Callable[[Tensor], Tensor],
    *,
    reduce: bool = True,
) -> Callable[[], Tensor]:
    """A step without its optimizer: forward, backward, averages of the dense gradients; returns the loss."""

    def step() -> Tensor:
        loss = call(setting.x).float().square().mean()
        loss.backward()
        if reduce:
            model.allreduce_gradients()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def time_rows(
    setting: Setting, steps: dict[str, Callable[[], Tensor]], repeats: int
) -> dict[str, Spread]:
    """Microseconds of a step of the slowest rank, in rotated order."""
    ranks, names = setting.ranks, list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + repeats):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            dist.barrier()
            synchronize(ranks.device)
            begin = time.perf_counter()
            steps[name]()
            synchronize(ranks.device)
            if turn >= WARM_UP:
                samples[name].append(1e6 * (time.perf_counter() - begin))
    every = ranks.gather(samples)
    return {
        name: Spread.of([max(v) for v in zip(*(one[name] for one in every), strict=True)])
        for name in names
    }


class Session:
    """One run on all ranks; rank 0 prints and writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begin = time.monotonic()
        environment = pretend_nodes(args.node_size) if args.node_size else {}
        self.ranks = ranks = Ranks(args.device, args.seconds + 60)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        generator = torch.Generator(ranks.device).manual_seed(100 + ranks.rank)
        shape = args.shape
        x = torch.randn(
            shape.num_tokens, shape.d_model, device=ranks.device, dtype=dtype, generator=generator
        )
        self.setting = Setting(args, ranks, x, {"dtype": dtype, "device": ranks.device})
        self.rows: list[Row] = []
        self.cost: CostModel | None = None
        self.dense_seconds = 0.0
        self.dense_bytes = 0
        self.record = {
            "machine": machine.describe(ranks.device, args.commit),
            "ranks": ranks.size,
            "node_size": args.node_size,
            "environment": environment,
            "shape": dataclasses.asdict(shape),
            "layers": args.layers,
            "dtype": str(dtype).removeprefix("torch."),
            "command": sys.argv[1:],
            "units": {"spread": "microseconds", "predicted": "seconds"},
        }

    def run(self) -> int:
        """All rows; 1 when one failed."""
        self._measure_job()
        self._measure_dense()
        for name in self.args.dispatch:
            self._fixed_and_chosen(name)
        if self.args.node_size:
            self._in_stages()
        for what in self.args.compiled:
            self._compiled(self.args.dispatch[0], what)
        if self.ranks.rank == 0:
            print(self.text(), flush=True)
        if self.args.trace is not None:
            self._trace(self.args.dispatch[0])
        dist.barrier()
        dist.destroy_process_group()
        return 1 if any(row.error for row in self.rows) else 0

    def say(self, text: str) -> None:
        """Rank 0 prints, at once."""
        if self.ranks.rank == 0:
            print(f"  {time.monotonic() - self.begin:5.1f} s  {text}", flush=True)

    def _late(self) -> bool:
        return any(self.ranks.gather(time.monotonic() - self.begin > self.args.seconds))

    def _measure_job(self) -> None:
        """The cost model of a layer of this size on these links."""
        shape, group = self.args.shape, rank_group(dist.group.WORLD)
        assert group is not None
        layer = JobLayer(
            shape.d_model,
            shape.d_hidden,
            3 if shape.activation == "swiglu" else 2,
            shape.num_experts // self.ranks.size,
            self.record["dtype"],
        )
        self.cost = job_model("benchmarks.schedules", layer, group, self.ranks.device)
        num_bytes = 64 << 20
        rate = (
            num_bytes
            * (group.size - 1)
            / group.size
            / self.cost.all_to_all_seconds(num_bytes, group.size)
        )
        self.record["all_to_all_gb_per_second"] = rate / 1e9
        self.say(
            f"measured this job: an all-to-all of 64 MiB leaves each rank at {rate / 1e9:.1f} GB/s"
        )

    def _measure_dense(self) -> None:
        """A step without experts and without the sums over ranks."""
        model = build(self.setting, Exact())
        for layer in model.module:
            layer.moe = GateOnly(layer.moe)
        self.dense_bytes = sum(p.nbytes for p in model.parameters())
        step = step_of(self.setting, model, model, reduce=False)
        self.dense_seconds = (
            time_rows(self.setting, {"dense": step}, self.args.repeats)["dense"].median * 1e-6
        )
        self.record |= {"dense_seconds": self.dense_seconds, "dense_bytes": self.dense_bytes}
        self.say(f"without experts a step takes {1e3 * self.dense_seconds:.2f} ms")

    def _predicted(
        self, schedule: Schedule, degrees: tuple[int, int], *, slices: bool = False
    ) -> float:
        """Seconds of a step."""
        assert self.cost is not None
        forward, backward = degrees
        layers = self.args.layers
        law = self.cost.all_reduce_law(self.ranks.size)
        reduce_seconds = law.seconds(self.dense_bytes)
        if slices:
            windows = [*self._windows(schedule, backward), 0.0]
            known = [0.0, *[self.dense_bytes / layers] * (layers - 1), self.dense_bytes / layers]
            reduce_seconds = plan_slices(known, windows, law).exposed_seconds
        experts = schedule.forward_seconds(forward) + schedule.backward_seconds(backward, forward)
        return self.dense_seconds + layers * experts + reduce_seconds

    def _windows(self, schedule: Schedule, degree: int) -> list[float]:
        return [schedule.backward.window(degree)] * self.args.layers

    def _fixed_and_chosen(self, name: str) -> None:
        """Fixed degrees and the chosen ones of one model, whose dispatchers are told to use them."""
        auto = AutoChunks(cost_model=self.cost, num_tokens=self.args.shape.num_tokens)
        model = build(self.setting, DISPATCHES[name](n_chunks=auto))
        own = dispatchers(model)
        schedule, chosen = own[0].schedule, tuple(own[0].degrees)
        assert schedule is not None
        wanted = {f"{name}, {r} chunks": (r, r) for r in DEGREES}
        wanted[f"{name}, chosen"] = chosen
        rows = [
            Row(label, degrees, self._predicted(schedule, degrees))
            for label, degrees in wanted.items()
        ]

        def step_with(degrees: tuple[int, int]) -> Callable[[], Tensor]:
            step = step_of(self.setting, model, model)

            def run() -> Tensor:
                for dispatcher in own:
                    dispatcher.set_degrees(Degrees(*degrees))
                return step()

            return run

        self._measure(rows, {row.label: step_with(row.degrees) for row in rows})

    def _in_stages(self) -> None:
        """The exact exchange, inside nodes and between them, in fixed numbers of chunks."""
        hierarchy = build_hierarchy(dist.group.WORLD, self.args.node_size)
        for degree in HIERARCHY_DEGREES:
            model = build(self.setting, Exact(n_chunks=degree, hierarchy=hierarchy))
            row = Row(f"exact in stages, {degree} chunks", (degree, degree))
            self._measure([row], {row.label: step_of(self.setting, model, model)})

    def _compiled(self, name: str, what: str) -> None:
        """One graph: one chunk, the chosen ones, and these with slices of the gradients beside the experts."""
        assert self.cost is not None
        auto = AutoChunks(cost_model=self.cost, num_tokens=self.args.shape.num_tokens)
        model = build(
            self.setting,
            DISPATCHES[name](n_chunks=1 if what == "first" else auto),
            in_graph=what == "slices",
        )
        (own, *_) = dispatchers(model)
        degrees = tuple(own.degrees)
        schedule = own.schedule
        passes: list[Any] = ["degrees", "order"]
        if what == "slices":
            assert schedule is not None
            law = self.cost.all_reduce_law(self.ranks.size)
            passes.append(moeops.compile.GradientSlices(law, self._windows(schedule, degrees[1])))
        torch._dynamo.reset()
        options = moeops.compile.options(model, passes=passes)
        compiled = torch.compile(model, fullgraph=True, options=options)
        label = {"first": "1 chunk", "chosen": "chosen", "slices": "chosen, slices"}[what]
        predicted = (
            None
            if schedule is None
            else self._predicted(schedule, degrees, slices=what == "slices")
        )
        row = Row(f"{name}, {label}, compiled", degrees, predicted)
        self._measure([row], {row.label: step_of(self.setting, model, compiled)})

    def _measure(self, rows: list[Row], steps: dict[str, Callable[[], Tensor]]) -> None:
        """Compare losses, then time; all ranks agree about what failed."""
        self.rows += rows
        if self._late():
            for row in rows:
                row.error = f"skipped: {self.args.seconds:g} s were used up"
            return
        for row in rows:
            loss, row.error = attempt(self.ranks, steps[row.label])
            if row.error:
                continue
            total = loss.clone()
            dist.all_reduce(total)
            row.loss = float(total) / self.ranks.size
            first = next(r.loss for r in self.rows if r.loss is not None)
            if abs(row.loss - first) > CLOSE * abs(first):
                row.error = f"the loss must be {first:g}, got {row.loss:g}"
        good = [row for row in rows if not row.error]
        timed = time_rows(
            self.setting, {row.label: steps[row.label] for row in good}, self.args.repeats
        )
        for row in good:
            row.spread = timed[row.label]
        self.say("; ".join(f"{row.label}: {self._state(row)}" for row in rows))
        if self.ranks.rank == 0:
            self._write()

    def _state(self, row: Row) -> str:
        if row.error:
            return row.error
        assert row.spread is not None
        predicted = "" if row.predicted is None else f", predicted {1e3 * row.predicted:.2f}"
        return f"{row.degrees} {row.spread.median / 1e3:.2f} ms{predicted}"

    def _trace(self, name: str) -> None:
        """Forward and backward of one layer with the chosen chunks, under the profiler."""
        auto = AutoChunks(cost_model=self.cost, num_tokens=self.args.shape.num_tokens)
        model = build(self.setting, DISPATCHES[name](n_chunks=auto)).module[0].moe
        x = self.setting.x.clone().requires_grad_()

        def step() -> Tensor:
            return model(x).float().square().mean()

        for _ in range(WARM_UP):
            step().backward()
        dist.barrier()
        measured = moeops.compile.measured_tasks(step)
        own = model.dispatcher
        predicted = {
            "forward": own.schedule.forward.timeline(own.degrees.forward),
            "backward": own.schedule.backward.timeline(own.degrees.backward),
        }
        if self.ranks.rank == 0:
            record = {
                "degrees": tuple(own.degrees),
                **{
                    source: {
                        way: [task._replace(name=task.name[:80]) for task in tasks]
                        for way, tasks in both.items()
                    }
                    for source, both in (("predicted", predicted), ("measured", measured))
                },
            }
            self.args.trace.parent.mkdir(parents=True, exist_ok=True)
            self.args.trace.write_text(json.dumps(record) + "\n")
        self.say("traced one layer")

    def text(self) -> str:
        """Milliseconds, prediction, and how much faster than one chunk of the same dispatcher and mode."""
        first: dict[tuple[str, bool], float] = {}
        lines = []
        for row in self.rows:
            degrees = f"{row.degrees[0]}, {row.degrees[1]}"
            if row.spread is None:
                lines.append([row.label, degrees, row.error, "", "", "", ""])
                continue
            key = (row.label.split(",")[0], row.label.endswith("compiled"))
            if row.label.split(", ")[1].startswith("1 chunk"):
                first[key] = row.spread.median
            speedup = f"{first[key] / row.spread.median:.2f}" if key in first else "-"
            predicted = error = "-"
            if row.predicted is not None:
                predicted = f"{1e3 * row.predicted:.2f}"
                error = f"{100 * (1e6 * row.predicted / row.spread.median - 1):+.1f} %"
            span = f"{row.spread.p10 / 1e3:.2f}..{row.spread.p90 / 1e3:.2f}"
            median = row.spread.median
            lines.append(
                [
                    row.label,
                    degrees,
                    f"{median / 1e3:.2f}",
                    span,
                    predicted,
                    error,
                    speedup,
                ]
            )
        header = ("schedule", "chunks", "step ms", "p10..p90", "predicted", "error", "x of 1 chunk")
        rate = self.record["all_to_all_gb_per_second"]
        where = f"nodes of {self.args.node_size} emulated, " if self.args.node_size else ""
        return f"{self.args.shape}, {self.args.layers} layers, {where}{rate:.1f} GB/s\n{table(header, lines)}"

    def _write(self) -> None:
        assert self.cost is not None
        record = {**self.record, "rows": [dataclasses.asdict(row) for row in self.rows]}
        record["links"] = {
            name: dataclasses.asdict(law)
            for name in ("inside_node", "all_gather", "reduce_scatter", "all_reduce")
            if (law := getattr(self.cost, name)) is not None
        }
        record["overlap_loss"] = self.cost.overlap_loss
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 when a row failed."""
    return Session(parse(argv)).run()


if __name__ == "__main__":
    sys.exit(main())
