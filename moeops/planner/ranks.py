"""The processes that torchrun started for a measurement."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moeops.profiling.clock import Ranks

TIMEOUT_SECONDS = 120.0


class TorchrunRanks(Ranks):
    """The processes that torchrun started, or this one alone.

    Args:
        device: "cpu" (gloo) or "cuda" (a GPU each, NCCL).
        op: what measures, for error messages.
        seconds: time-out of every collective.

    Attributes:
        rank, size: of this process, and of the job.
        node_size: ranks on a node, as torchrun started them.
    """

    def __init__(
        self, device: str, *, op: str = "profile", seconds: float = TIMEOUT_SECONDS
    ) -> None:
        environment = os.environ
        by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environment.keys()
        super().__init__(
            torch.device("cpu"),
            int(environment["RANK"]) if by_torchrun else 0,
            int(environment["WORLD_SIZE"]) if by_torchrun else 1,
        )
        self.node_size = int(environment.get("LOCAL_WORLD_SIZE", self.size))
        local = int(environment.get("LOCAL_RANK", "0"))
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise RuntimeError(
                    f"{op}: every rank must have a GPU of its own, got {torch.cuda.device_count()} for local rank "
                    f"{local}. Lower --nproc-per-node, or pass --device cpu."
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        # What ranks tell each other must not depend on the GPUs' state.
        self._control: Any = None
        if by_torchrun:
            timeout = timedelta(seconds=seconds)
            if device == "cuda":
                dist.init_process_group("nccl", timeout=timeout, device_id=self.device)
            else:
                dist.init_process_group("gloo", timeout=timeout)
            self._control = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self) -> None:
        """Wait for the other ranks' hosts."""
        if self._control is not None:
            dist.barrier(self._control)

    def meet(self, token: torch.Tensor) -> None:
        """Let the devices wait for each other."""
        dist.all_reduce(token)

    def close(self) -> None:
        """Leave the group, all ranks together."""
        if self._control is not None:
            self.barrier()
            dist.destroy_process_group()
