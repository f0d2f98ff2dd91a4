"""Experts that come to their tokens, where few have most of them: ``torchrun --nproc-per-node=4 -m benchmarks.skew``.

A layer whose gate chooses experts with probabilities that fall as a power of their rank (Zipf), in which the exact
dispatcher is timed alone, with shadowing by the cost model of this job (or of --profile), and with replicas of the most
chosen experts on all ranks; beside it the gathering dispatcher with room for the busiest rank. Each result is compared
with the exact one's. The prediction of a row is what the policy's own formula says of its experts against none, so that
the saving is predicted; --alpha 0 is a balanced gate, where nothing may be lost. Exit code 1 when a row failed.

T tokens of a rank, K experts each, E experts, W ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moeops
from benchmarks import machine, rank_jobs, shapes
from benchmarks.bench_parallel import release
from benchmarks.inputs import generator
from benchmarks.ranks import Ranks, RankTimer, attempt
from benchmarks.registry import Case
from benchmarks.report import table
from benchmarks.timing import Spread, training_runner
from moeops.comm.groups import rank_group
from moeops.cost.model import CostModel
from moeops.distributed import Exact, Gather, ShadowPolicy
from moeops.gates import BaseGate
from moeops.profiling.job import JobLayer, job_model

COUNTS = (1, 2, 4, 8)  # of experts with replicas, and of shadows at most
CLOSE = {torch.bfloat16: 4e-2, torch.float32: 1e-4}  # relative norm


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with their defaults filled in for the device."""
    parser = rank_jobs.parser_of("skew", __doc__, 4)
    parser.add_argument("--configs", help="comma list; default: qwen3_30b,mixtral_8x7b; cpu: tiny")
    parser.add_argument("--alpha", type=float, default=1.2, help="power of Zipf's law, default 1.2")
    parser.add_argument("--profile", type=Path, help="of python -m moeops profile")
    parser.add_argument("--repeats", type=int, default=10, help="samples, default 10")
    parser.add_argument("--seconds", type=float, default=60, help="no row begins later, default 60")
    args = rank_jobs.parse(parser, "skew", argv)
    args.configs = rank_jobs.shapes_of(parser, args, "configs")
    return args


class TableGate(BaseGate):
    """Choices that are given; weights that depend on the token, so that the gate has gradients."""

    def __init__(
        self, d_model: int, num_expert: int, world_size: int = 1, top_k: int = 2, *, ids: Tensor
    ) -> None:
        super().__init__(num_expert, world_size)
        self.top_k, self.ids = top_k, ids
        self.gate = nn.Linear(d_model, self.tot_expert)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights, ``[T, K]``."""
        return self.ids, self.gate(x).gather(1, self.ids).float().softmax(1)


def zipf_ids(shape: shapes.Shape, alpha: float, device: torch.device, rank: int) -> Tensor:
    """K different experts for each token; which expert is how popular is drawn once, alike on all ranks."""
    popularity = torch.arange(1, shape.num_experts + 1, dtype=torch.float64).pow(-alpha)
    order = torch.randperm(shape.num_experts, generator=torch.Generator().manual_seed(7))
    scores = torch.empty_like(popularity)
    scores[order] = popularity
    chosen = torch.multinomial(
        scores.expand(shape.num_tokens, -1),
        shape.top_k,
        generator=torch.Generator().manual_seed(rank),
    )
    return chosen.to(device)


@dataclasses.dataclass
class Row:
    """One dispatcher on one layer: microseconds of the slowest rank, predictions in seconds."""

    shape: str
    label: str
    forward: Spread | None = None
    total: Spread | None = None
    travelling: int = 0  # experts whose weights travel
    predicted_saving: float | None = None
    error: str = ""


class Problem:
    """A skewed layer, the tokens of this rank, and what the policy's formula says of any set of experts."""

    def __init__(
        self, shape: shapes.Shape, ranks: Ranks, alpha: float, profile: Path | None
    ) -> None:
        self.shape, self.ranks = shape, ranks
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        kind = {
            "device": ranks.device,
            "dtype": self.dtype,
            "generator": generator(ranks.device, ranks.rank),
        }
        size = (shape.num_tokens, shape.d_model)
        self.x = torch.randn(*size, **kind).requires_grad_()
        self.grad_y = torch.randn(*size, **kind)
        self.ids = zipf_ids(shape, alpha, ranks.device, ranks.rank)
        counts = torch.bincount(self.ids.flatten(), minlength=shape.num_experts)
        every = [torch.zeros_like(counts) for _ in range(ranks.size)]
        dist.all_gather(every, counts)
        self.counts = torch.stack(every)  # [W, E]
        self.policy = self._policy(profile)
        self.want: list[Tensor] = []

    @property
    def num_expert(self) -> int:
        """E_local."""
        return self.shape.num_experts // self.ranks.size

    @property
    def imbalance(self) -> float:
        """Rows of the busiest rank over the mean."""
        rows = self.counts.view(self.ranks.size, self.ranks.size, self.num_expert).sum((0, 2))
        return float(rows.max() / rows.double().mean())

    def _policy(self, profile: Path | None) -> ShadowPolicy:
        shape, group = self.shape, rank_group(dist.group.WORLD)
        assert group is not None
        projections = 3 if shape.activation == "swiglu" else 2
        if profile is not None:
            model = CostModel.load(profile)
        else:
            name = str(self.dtype).removeprefix("torch.")
            layer = JobLayer(shape.d_model, shape.d_hidden, projections, self.num_expert, name)
            model = job_model("benchmarks.skew", layer, group, self.ranks.device)
        return ShadowPolicy.from_cost_model(
            model,
            shape.d_model,
            shape.d_hidden,
            world_size=group.size,
            num_projections=projections,
            dtype=self.dtype,
            max_shadows=max(COUNTS),
        )

    def seconds(self, experts: Sequence[int]) -> float:
        """The formula of ``ShadowPolicy``: the slowest rank's rows and exchange, and all weights."""
        size = self.ranks.size
        owner = torch.arange(self.shape.num_experts) // self.num_expert
        counts = self.counts.cpu()
        stays = torch.zeros(size, self.shape.num_experts, dtype=torch.bool)
        stays[:, list(experts)] = True
        stays |= owner == torch.arange(size).unsqueeze(1)
        moved, kept = counts.masked_fill(stays, 0), counts.masked_fill(~stays, 0)
        received = torch.zeros(size, dtype=counts.dtype).index_add(0, owner, moved.sum(0))
        rows = kept.sum(1) + received
        policy = self.policy
        by_rank = rows * policy.row_seconds
        by_rank = by_rank + torch.maximum(moved.sum(1), received) * policy.exchange_seconds
        return float(by_rank.max()) + len(experts) * policy.fetch_seconds

    def hottest(self, count: int) -> list[int]:
        """The most chosen experts."""
        return self.counts.sum(0).sort(descending=True, stable=True).indices[:count].tolist()

    def everywhere_but_at_home(self, expert: int) -> list[int]:
        """All ranks but an expert's own."""
        return [rank for rank in range(self.ranks.size) if rank != expert // self.num_expert]

    def dispatches(self) -> dict[str, Any]:
        """Rows of the table; the first is what the others are compared with."""
        found: dict[str, Any] = {"exact": Exact()}
        for count in COUNTS:
            if count < self.shape.num_experts:
                policy = dataclasses.replace(self.policy, max_shadows=count)
                found[f"shadowing, at most {count}"] = Exact(shadowing=policy)
        for count in COUNTS:
            if count < self.shape.num_experts:
                replicas = {e: self.everywhere_but_at_home(e) for e in self.hottest(count)}
                found[f"replicas of {count}"] = Exact(replicas=replicas)
        found["gather"] = Gather(rows=min(float(self.ranks.size), self.imbalance * 1.01))
        return found

    def build(self, dispatch: Any) -> moeops.FMoETransformerMLP:
        """The layer, with the same parameters every time."""
        shape = self.shape
        torch.manual_seed(self.ranks.rank)

        def gate(*sizes: Any, **options: Any) -> TableGate:
            return TableGate(*sizes, ids=self.ids, **options)

        return rank_jobs.build_layer(
            shape,
            self.num_expert,
            gate=gate,
            world_size=self.ranks.size,
            dispatch=dispatch,
            dtype=self.dtype,
            device=self.ranks.device,
        )


def measure_row(problem: Problem, row: Row, dispatch: Any, timer: RankTimer, repeats: int) -> None:
    """Check a dispatcher against the exact one, then time it."""
    layer = problem.build(dispatch)
    chosen: list[Tensor] = []
    if hasattr(layer.dispatcher, "hooks"):
        layer.dispatcher.hooks = (chosen.append,)
    leaves = {"x": problem.x, **dict(layer.named_parameters())}
    y = layer(problem.x)
    grads = torch.autograd.grad(y, list(leaves.values()), problem.grad_y)
    got = [y.detach(), *grads]
    if chosen:
        layer.dispatcher.hooks = ()
        row.travelling = int(chosen[0].sum())
        row.predicted_saving = problem.seconds([]) - problem.seconds(
            chosen[0].nonzero().flatten().tolist()
        )
    elif getattr(dispatch, "replicas", None):
        row.travelling = len(dispatch.replicas)
        row.predicted_saving = problem.seconds([]) - problem.seconds(list(dispatch.replicas))
    if not problem.want:
        problem.want = got
    for name, one, other in zip(("y", *leaves), got, problem.want, strict=True):
        scale = float(other.float().norm())
        error = float((one.float() - other.float()).norm()) / scale
        if not error < CLOSE[problem.dtype]:
            raise RuntimeError(
                f"{row.label}: {name} must equal the exact one, got an error of {error:.1e}"
            )
    del y, grads, got
    case = Case(
        forward=lambda: (layer(problem.x),),
        check=lambda outputs, grads: {},
        leaves=leaves,
        grad_outputs=(problem.grad_y,),
    )
    try:
        samples = timer.measure({"row": training_runner(case)}, repeats=repeats)["row"]
    finally:
        case.clear_grads()
    row.forward = Spread.of([forward for forward, _ in samples])
    row.total = Spread.of([sum(parts) for parts in samples])


def text(rows: list[Row]) -> str:
    """Milliseconds, and savings against the exact dispatcher, measured and predicted."""
    lines, base = [], None
    for row in rows:
        if row.forward is None or row.total is None:
            lines.append([row.label, row.error, "", "", "", "", ""])
            continue
        base = base or row
        assert base.total is not None
        saving = (base.total.median - row.total.median) / 1e3
        predicted = "-" if row.predicted_saving is None else f"{1e3 * row.predicted_saving:+.3f}"
        lines.append(
            [
                row.label,
                f"{row.forward.median / 1e3:.3f}",
                f"{row.total.median / 1e3:.3f}",
                f"{row.total.p10 / 1e3:.3f}..{row.total.p90 / 1e3:.3f}",
                str(row.travelling),
                f"{saving:+.3f}",
                predicted,
            ]
        )
    header = ("dispatch", "fwd ms", "fwd+bwd ms", "p10..p90", "experts", "saves ms", "predicted")
    return table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 when a row failed."""
    args = parse(argv)
    begin = time.monotonic()
    ranks = Ranks(args.device, args.seconds + 60)
    timer = RankTimer(ranks, lead_passes=12 if args.device == "cuda" else 1)
    record: dict[str, Any] = {
        "machine": machine.describe(ranks.device, args.commit),
        "ranks": ranks.size,
        "alpha": args.alpha,
        "command": sys.argv[1:],
        "units": {"times": "microseconds", "predicted_saving": "seconds"},
        "layers": {},
    }
    failed = False
    for shape in args.configs:
        problem = Problem(shape, ranks, args.alpha, args.profile)
        rows = []
        for label, dispatch in problem.dispatches().items():
            row = Row(shape.name, label)
            rows.append(row)
            if any(ranks.gather(time.monotonic() - begin > args.seconds)):
                row.error = f"skipped: {args.seconds:g} s were used up"
            else:
                _, row.error = attempt(
                    ranks,
                    lambda r=row, d=dispatch, p=problem: measure_row(p, r, d, timer, args.repeats),
                )
                release(ranks.device)
            failed |= bool(row.error)
        record["layers"][shape.name] = {
            "imbalance": problem.imbalance,
            "policy": dataclasses.asdict(problem.policy),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        if ranks.rank == 0:
            print(
                f"{shape}, Zipf {args.alpha:g}, busiest rank {problem.imbalance:.2f} times the mean"
            )
            print(f"{problem.policy}\n{text(rows)}\n", flush=True)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
