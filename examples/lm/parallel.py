"""Several processes that train one model: who they are, and what travels between them. W ranks.

Each rank reads its share of every batch. Parameters that all ranks hold are averaged after the backward; with expert
parallelism each rank holds E / W experts of every layer. A checkpoint is one file, written by rank 0, that holds the
whole model as one rank would write it, so that any number of ranks can go on from it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lm.errors import UsageError
from moeops.gates import BaseGate, ReMoEGate

EXPERTS = (
    ".mlp.experts."  # in the names of parameters that expert parallelism divides, along dimension 0
)


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

    def join_rows(self, x: Tensor) -> Tensor:
        """All ranks' rows on rank 0, in the order of ranks; elsewhere the tensor itself."""
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.is_first else None
        dist.gather(x.contiguous(), parts)
        return x if parts is None else torch.cat(parts)

    def rows(self, x: Tensor) -> Tensor:
        """This rank's rows of a whole tensor."""
        return x.chunk(self.size)[self.rank].clone()


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
    dist.destroy_process_group()


def check_shares(ranks: Ranks, batch: int, experts: int | None) -> None:
    """Refuse what cannot be divided among the ranks; ``experts`` is None where they are not divided."""
    for name, number in (("--batch", batch), ("--experts", experts)):
        if number is not None and number % ranks.size:
            raise UsageError(
                f"{name} must be a multiple of the {ranks.size} ranks, got {number}. Change one of them."
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


def sum_counts(model: torch.nn.Module) -> None:
    """Have ReMoE's coefficients follow the tokens of all ranks; DeepSeek's bias sees to that by itself."""
    for gate in model.modules():
        if isinstance(gate, ReMoEGate):
            dist.all_reduce(gate.active)
            dist.all_reduce(gate.tokens)


def share_of(ranks: Ranks, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a whole model's tensors belongs to this rank."""
    return {n: ranks.rows(x) if EXPERTS in n else x for n, x in tensors.items()}


def whole_of(ranks: Ranks, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``share_of``, on rank 0; every rank must call."""
    return {n: ranks.join_rows(x) if EXPERTS in n else x for n, x in tensors.items()}


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
