"""The processes that torchrun started for ``python -m moeops profile``."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moeops.profiling.clock import Ranks

TIMEOUT_SECONDS = 120


class TorchrunRanks(Ranks):
    """The processes that torchrun started, or this one alone.

    Args:
        device: "cpu" (gloo) or "cuda" (a GPU each, NCCL).

    Attributes:
        rank, size: of this process, and of the job.
        node_size: ranks on a node, as torchrun started them.
    """

    def __init__(self, device: str) -> None:
        environment = os.environ
        size = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1
        super().__init__(
            torch.device("cpu"), int(environment.get("RANK", "0")) if size > 1 else 0, size
        )
        self.node_size = int(environment.get("LOCAL_WORLD_SIZE", self.size))
        local = int(environment.get("LOCAL_RANK", "0"))
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise RuntimeError(
                    f"profile: every rank must have a GPU of its own, got {torch.cuda.device_count()} for local rank "
                    f"{local}. Lower --nproc-per-node, or pass --device cpu."
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        self._control: Any = None
        if self.size > 1:
            timeout = timedelta(seconds=TIMEOUT_SECONDS)
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
