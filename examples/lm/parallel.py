"""Several processes that train one model: who they are, and what travels between them. W ranks.

Each rank reads its share of every batch. Parameters that all ranks hold are averaged after the backward; with expert
parallelism each rank holds E / W experts of every layer, or shards of more experts. A checkpoint is one file, written
by rank 0, that holds the whole model as one rank would write it, so that any number of ranks can go on from it.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lm.errors import UsageError
from moeops.dispatch.shards import ShardSpan, join_shards, take_shard
from moeops.gates import BaseGate
from moeops.layers import FusedExperts

Spans = dict[str, list[ShardSpan]]


@dataclass(frozen=True)
class Ranks:
    """This process among the others; one alone needs no torch.distributed."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def say(self, *values: Any) -> None:
        """Print on rank 0."""
        if self.is_first:
            print(*values, flush=True)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the ranks."""
        if self.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.size

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any rank's flag is set, the same answer on all of them."""
        if self.size == 1:
            return flag
        count = torch.full((), int(flag), device=device)
        dist.all_reduce(count)
        return bool(count)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def part_of(self, whole: Tensor, spans: list[ShardSpan]) -> Tensor:
        """This rank's experts, or shards of them, of a tensor of all experts."""
        expert_rank, shard = divmod(self.rank, len(spans))
        return take_shard(whole.chunk(self.size // len(spans))[expert_rank], spans[shard])

    def join(self, part: Tensor, spans: list[ShardSpan]) -> Tensor:
        """The inverse of ``part_of`` on rank 0, where all ranks' parts meet; elsewhere the part itself."""
        shapes = []
        for dim, _, ranges in spans:
            width = sum(length for _, length in ranges)
            shapes.append((*part.shape[:dim], width, *part.shape[dim + 1 :]))
        sizes = [math.prod(shape) for shape in shapes]
        flat = part.new_zeros(max(sizes))  # what is gathered must have one size
        flat[: part.numel()] = part.reshape(-1)
        flats = [torch.empty_like(flat) for _ in range(self.size)] if self.is_first else None
        dist.gather(flat, flats)
        if flats is None:
            return part
        experts = []
        for first in range(0, self.size, len(spans)):
            found = zip(flats[first:], sizes, shapes, strict=False)
            experts.append(join_shards([f[:n].view(s) for f, n, s in found], spans))
        return torch.cat(experts)


ONE_RANK = Ranks()


@contextlib.contextmanager
def start_ranks(device: str | None) -> Iterator[tuple[Ranks, str | None]]:
    """Join the processes that torchrun started, if it did; the device is a GPU for each rank, or the CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(), device
        return
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(
            f"--device must be cpu or cuda with several ranks, which take a GPU each, got {device}. Leave it out."
        )
    backend = "gloo"
    if device == "cuda":
        backend, local = "nccl", int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"--device cuda needs a GPU for every rank, got {torch.cuda.device_count()} for local rank {local}. "
                "Lower --nproc-per-node, or use --device cpu."
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group(backend)
    # Not in a finally: a rank that fails must not wait for the others here.
    yield Ranks(dist.get_rank(), size), device
    # What still holds the group must go first: threads of a group that outlives this call would run while Python ends.
    gc.collect()
    dist.destroy_process_group()


def check_shares(
    ranks: Ranks, batch: int, experts: int | None, d_hidden: int = 1, num_shards: int = 1
) -> None:
    """Refuse what cannot be divided among the ranks; ``experts`` is None where they are not divided."""
    if ranks.size % num_shards:
        raise UsageError(
            f"--expert-tensor-parallel must divide the {ranks.size} ranks, got {num_shards}. Change one of them."
        )
    if d_hidden % num_shards:
        raise UsageError(
            f"--d-hidden must be a multiple of --expert-tensor-parallel = {num_shards}, got {d_hidden}. Change one of "
            "them."
        )
    shares = (
        ("--batch", batch, ranks.size, "ranks"),
        ("--experts", experts, ranks.size // num_shards, "ranks that hold different experts"),
    )
    for name, number, size, what in shares:
        if number is not None and number % size:
            raise UsageError(
                f"{name} must be a multiple of the {size} {what if num_shards > 1 else 'ranks'}, got {number}. Change "
                "one of them."
            )


def balance_over_ranks(model: torch.nn.Module, ranks: Ranks) -> None:
    """Have gates balance the tokens of all ranks, as one rank with the whole batch does."""
    if ranks.size == 1:
        return
    for gate in model.modules():
        if isinstance(gate, BaseGate):
            gate.group = dist.group.WORLD
            if hasattr(gate, "global_balance"):
                gate.global_balance = True
            if getattr(gate, "balance", None) is True:
                gate.balance = "global"


def expert_spans(model: torch.nn.Module) -> Spans:
    """What each shard of an expert holds of it, for every parameter that ranks divide."""
    spans: Spans = {}
    for prefix, experts in model.named_modules():
        if isinstance(experts, FusedExperts):
            for name, _ in experts.named_parameters():
                shards = range(experts.num_shards)
                spans[f"{prefix}.{name}"] = [experts.shard_span(name, shard) for shard in shards]
    return spans


def share_of(ranks: Ranks, spans: Spans, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a whole model's tensors, named ``PARAMETER`` or ``PARAMETER/STATE``, belongs to this rank."""
    found = {name: spans.get(name.partition("/")[0]) for name in tensors}
    return {
        name: ranks.part_of(x, found[name]) if found[name] else x for name, x in tensors.items()
    }


def whole_of(ranks: Ranks, spans: Spans, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``share_of``, on rank 0; every rank must call."""
    found = {name: spans.get(name.partition("/")[0]) for name in tensors}
    return {name: ranks.join(x, found[name]) if found[name] else x for name, x in tensors.items()}


def map_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], state: dict, convert
) -> dict[str, Any]:
    """An optimizer's state with ``convert`` applied to the states that have a parameter's shape, by its name."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    converted = {}
    for index, values in state["state"].items():
        by_name = {f"{names[order[index]]}/{key}": value for key, value in values.items()}
        # Scalars, such as the step count, are the same on all ranks.
        tensors = {n: v for n, v in by_name.items() if isinstance(v, Tensor) and v.dim() > 0}
        by_name.update(convert(tensors))
        converted[index] = {n.rpartition("/")[2]: value for n, value in by_name.items()}
    return {**state, "state": converted}
