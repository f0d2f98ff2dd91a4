"""Expert-parallel layers, forward and backward. T tokens per rank, D width, E experts, K experts per token, W ranks."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import moeops
from benchmarks.bench_fastmoe_lane import MIN_GAP
from benchmarks.inputs import BlockProblem, block_reference, generator
from benchmarks.rank_jobs import build_layer
from benchmarks.ranks import Ranks, RankTimer
from benchmarks.registry import Case, compare
from benchmarks.report import MIB, table
from benchmarks.shapes import Shape
from benchmarks.timing import (
    Spread,
    count_host_syncs,
    measure_memory,
    synchronize,
    training_runner,
)
from moeops.distributed import Exact, Gather, Static

CAPACITY = 1.25  # of the static dispatcher: a factor on T * K / E
GATHERED = 1.25  # rows of the dispatcher that gathers: a factor on T * K
ONE_RANK = "one rank"
BY_PAIR = "exact, by pair"
PEER = "gather, peer"
# Label, options of the layer; the first one has all experts on every rank and exchanges nothing.
DISPATCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    (ONE_RANK, {}),
    (BY_PAIR, {"dispatch": "exact"}),
    ("exact", {"dispatch": "exact"}),
    ("gather", {"dispatch": Gather()}),
    ("gather, 1.25 rows", {"dispatch": Gather(rows=GATHERED)}),
    (PEER, {"dispatch": Gather(transport="peer")}),
    ("static", {"dispatch": Static(CAPACITY)}),
    ("exact, 2 chunks", {"dispatch": Exact(n_chunks=2)}),
    ("exact, 4 chunks", {"dispatch": Exact(n_chunks=4)}),
)


class ByPair(moeops.FMoETransformerMLP):
    """Experts that take rows only, so that a token travels once per expert."""

    def _block(self) -> None:
        return None


@dataclass
class LayerRow:
    """One layer on W ranks; times in microseconds of the slowest rank, memory in bytes of the rank that needs most."""

    shape: str
    label: str
    mode: str  # eager, compiled
    error: str = ""
    errors: dict[str, float] = field(default_factory=dict)  # relative, by tensor
    forward: Spread | None = None
    total: Spread | None = None
    first_step_seconds: float | None = None
    copies_to_host: int | None = None
    host_syncs: int | None = None
    peak_bytes: int | None = None
    dropped: float | None = None
    speedup_forward: float | None = (
        None  # tokens per second over those of one rank with all experts
    )
    speedup_total: float | None = None
    flops_forward: int = 0  # of one rank
    flops_total: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values; what was not measured is left out."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "", {})}


class LayerProblem:
    """A layer with all its experts, this rank's tokens, and what must come out."""

    def __init__(self, shape: Shape, ranks: Ranks, dtype: torch.dtype):
        self.shape, self.ranks, self.dtype = shape, ranks, dtype
        torch.manual_seed(0)
        self.whole = self._build(shape.num_experts)
        for parameter in self.whole.parameters():
            dist.broadcast(parameter.detach(), 0)
        self.x = self._tokens().requires_grad_()
        gen = generator(ranks.device, 100 + ranks.rank)
        self.grad_y = torch.randn(self.x.shape, device=ranks.device, dtype=dtype, generator=gen)
        self._expected: dict[bool, dict[str, Tensor]] = {}

    def _build(
        self,
        num_expert: int,
        kind: type[moeops.FMoETransformerMLP] = moeops.FMoETransformerMLP,
        **options: Any,
    ) -> moeops.FMoETransformerMLP:
        return build_layer(
            self.shape,
            num_expert,
            kind,
            gate=moeops.gates.NaiveGate,
            dtype=self.dtype,
            device=self.ranks.device,
            **options,
        )

    def _tokens(self) -> Tensor:
        """Random tokens, other ones on each rank, whose experts do not depend on rounding."""
        shape, device = self.shape, self.ranks.device
        gen = generator(device, self.ranks.rank)
        x = torch.randn(
            2 * shape.num_tokens, shape.d_model, device=device, dtype=self.dtype, generator=gen
        )
        router = self.whole.gate.gate
        with torch.no_grad():
            logits = F.linear(x.double(), router.weight.double(), router.bias.double())
            best = logits.sort(dim=1, descending=True).values
            clear = best[:, shape.top_k - 1] - best[:, shape.top_k] > MIN_GAP
        x = x[clear][: shape.num_tokens].clone()
        if x.shape[0] != shape.num_tokens:
            raise RuntimeError(f"{shape.name}: too few tokens with clear routing, got {x.shape[0]}")
        return x

    def build(self, label: str, options: dict[str, Any]) -> moeops.FMoETransformerMLP:
        """The layer of a row, with the whole layer's parameters or this rank's share of them."""
        if label == ONE_RANK:
            return self.whole
        size = self.ranks.size
        kind = ByPair if label == BY_PAIR else moeops.FMoETransformerMLP
        layer = self._build(self.shape.num_experts // size, kind, world_size=size, **options)
        layer.load_state_dict(self._share(self.whole.state_dict()))
        return layer

    def _share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's experts."""
        first = self.shape.num_experts // self.ranks.size * self.ranks.rank
        last = first + self.shape.num_experts // self.ranks.size
        return {
            name: value[first:last] if name.startswith("experts.") else value
            for name, value in tensors.items()
        }

    def expected(self, row: LayerRow, options: dict[str, Any]) -> dict[str, Tensor]:
        """Output and gradients of the layer with all experts on this rank; it drops what the static one drops.

        For that layer itself, those of a loop over its experts in a wider type.
        """
        if row.label == ONE_RANK:
            return self._run(self.whole) if row.mode == "compiled" else self._loop()
        static = isinstance(options.get("dispatch"), Static)
        if static not in self._expected:
            layer = self.whole
            if static:
                layer = self._build(self.shape.num_experts, **options)
                layer.load_state_dict(self.whole.state_dict())
            values = self._run(layer)
            for name, value in values.items():
                if name.startswith("grad_experts."):  # reached by the tokens of all ranks
                    values[name] = value.float()
                    dist.all_reduce(values[name])
            shares = self._share({k.removeprefix("grad_"): v for k, v in values.items()})
            self._expected[static] = {k: shares[k.removeprefix("grad_")].clone() for k in values}
        return self._expected[static]

    def _loop(self) -> dict[str, Tensor]:
        with torch.no_grad():
            ids, weights = self.whole.gate(self.x)[:2]
        experts = self.whole.experts
        problem = BlockProblem(
            self.shape, self.x, ids, weights, experts.w_up, experts.w_down, self.grad_y, {}
        )
        values = block_reference(problem)
        # The gate's part of the other gradients is not in there.
        names = {"y": "y", "grad_w_up": "grad_experts.w_up", "grad_w_down": "grad_experts.w_down"}
        return {name: values[key] for key, name in names.items()}

    def _run(self, layer: moeops.FMoETransformerMLP) -> dict[str, Tensor]:
        names, leaves = zip(*leaves_of(layer, self.x).items(), strict=True)
        y = layer(self.x)
        grads = torch.autograd.grad(y, leaves, self.grad_y)
        return {"y": y.detach(), **{f"grad_{n}": g for n, g in zip(names, grads, strict=True)}}

    def dropped(self, options: dict[str, Any]) -> float:
        """Share of this rank's pairs that the static dispatcher drops."""
        if not isinstance(options.get("dispatch"), Static):
            return 0.0
        layer = self._build(self.shape.num_experts, **options)
        capacity = layer.dispatcher.capacity_of(self.shape.num_pairs)
        with torch.no_grad():
            ids = self.whole.gate(self.x)[0].flatten().long()
        loads = torch.bincount(ids, minlength=self.shape.num_experts)
        return float((loads - capacity).clamp(min=0).sum()) / self.shape.num_pairs


def leaves_of(layer: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What gets gradients."""
    return {"x": x, **dict(layer.named_parameters())}


def measure_row(
    problem: LayerProblem, row: LayerRow, options: dict[str, Any], timer: RankTimer, repeats: int
) -> None:
    """Check a layer, then fill in everything that is measured of it."""
    layer = problem.build(row.label, options)
    call = layer
    if row.mode == "compiled":
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, options=moeops.compile.options(layer))
    want = problem.expected(row, options)

    def check(outputs, grads) -> dict[str, float]:
        got = {"y": outputs[0], **{f"grad_{name}": grad for name, grad in grads.items()}}
        return compare(got, want, problem.dtype)

    case = Case(
        forward=lambda: (call(problem.x),),
        check=check,
        leaves=leaves_of(layer, problem.x),
        grad_outputs=(problem.grad_y,),
    )

    try:
        _fill_in(row, case, problem, options, timer, repeats)
    finally:
        case.clear_grads()


def _fill_in(
    row: LayerRow,
    case: Case,
    problem: LayerProblem,
    options: dict[str, Any],
    timer: RankTimer,
    repeats: int,
) -> None:
    ranks = problem.ranks

    def step() -> None:
        case.backward(case.forward())
        case.clear_grads()

    begin = time.perf_counter()
    outputs = case.forward()
    case.backward(outputs)
    synchronize(ranks.device)
    row.first_step_seconds = time.perf_counter() - begin
    row.errors = case.check([output.detach() for output in outputs], case.read_grads())
    del outputs
    case.clear_grads()
    samples = timer.measure({"row": training_runner(case)}, repeats=repeats)["row"]
    row.forward = Spread.of([forward for forward, _ in samples])
    row.total = Spread.of([sum(parts) for parts in samples])
    row.host_syncs = count_host_syncs(step, ranks.device)
    row.copies_to_host = count_copies_to_host(step, ranks.device)
    memory = measure_memory(case, ranks.device)
    row.peak_bytes = None if memory is None else max(ranks.gather(memory[1]))
    row.dropped = max(ranks.gather(problem.dropped(options)))


def count_copies_to_host(call, device: torch.device) -> int | None:
    """Copies from the device to the host that the profiler sees in ``call``; None on CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True
    ) as profiler:
        call()
        synchronize(device)
    return sum(
        event.device_type == DeviceType.CUDA and "DtoH" in event.name for event in profiler.events()
    )


def copy_counter_works(device: torch.device) -> bool:
    """Whether the profiler sees a copy that is there."""
    x = torch.ones(4, device=device)
    return count_copies_to_host(lambda: x.cpu(), device) == 1


def add_speedups(rows: list[LayerRow], num_ranks: int) -> None:
    """Tokens per second of W ranks over those of one rank with all experts, in the same mode."""
    alone = {(row.shape, row.mode): row for row in rows if row.label == ONE_RANK}
    for row in rows:
        base = alone.get((row.shape, row.mode))
        if row.label == ONE_RANK or base is None or base.total is None or row.total is None:
            continue
        assert base.forward is not None
        assert row.forward is not None
        row.speedup_forward = num_ranks * base.forward.median / row.forward.median
        row.speedup_total = num_ranks * base.total.median / row.total.median


def layer_table(rows: list[LayerRow]) -> str:
    """Milliseconds, speed, scaling, copies and memory; errors below."""
    header = (
        "layer", "mode", "fwd ms", "fwd+bwd ms", "p10..p90", "fwd TF/s", "f+b TF/s per rank",
        "fwd x", "f+b x", "copies", "syncs", "peak MB", "dropped %", "first s",
    )  # fmt: skip
    lines, notes = [], []
    for row in rows:
        label = f"{row.shape} {row.label}"
        if row.total is None or row.forward is None:
            lines.append([label, row.mode, "FAILED", *[""] * (len(header) - 3)])
            notes.append(f"  FAILED {label}, {row.mode}: {row.error}")
            continue
        lines.append(
            [
                label,
                row.mode,
                f"{row.forward.median / 1e3:.3f}",
                f"{row.total.median / 1e3:.3f}",
                f"{row.total.p10 / 1e3:.3f}..{row.total.p90 / 1e3:.3f}",
                f"{row.flops_forward / row.forward.median / 1e6:.3g}",
                f"{row.flops_total / row.total.median / 1e6:.3g}",
                _number(row.speedup_forward, ".2f"),
                _number(row.speedup_total, ".2f"),
                _number(row.copies_to_host, "d"),
                _number(row.host_syncs, "d"),
                _number(None if row.peak_bytes is None else row.peak_bytes / MIB, ".0f"),
                _number(None if row.dropped is None else 100 * row.dropped, ".2f"),
                _number(row.first_step_seconds, ".1f"),
            ]
        )
    return "\n".join([table(header, lines), *notes])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def release(device: torch.device) -> None:
    """Give back what a row held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
