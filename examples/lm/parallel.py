"""Several processes that train one model: who they are, and what travels between them. W ranks.

Each rank reads its share of every batch. Parameters that all ranks hold are averaged after the backward; with expert
parallelism each rank holds E / W experts of every layer, or shards of more experts.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lm.errors import UsageError
from moeops.gates import BaseGate


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
    ranks: Ranks,
    batch: int,
    experts: int | tuple[int, ...] | None,
    d_hidden: int = 1,
    num_shards: int = 1,
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
    what = "ranks that hold different experts"
    counts = (experts,) if isinstance(experts, int) else experts or ()
    shares = (
        ("--batch", batch, ranks.size, "ranks"),
        *(("--experts", count, ranks.size // num_shards, what) for count in counts),
    )
    for name, number, size, what in shares:
        if number % size:
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
            if getattr(gate, "balance", None) is True:
                gate.balance = "global"
