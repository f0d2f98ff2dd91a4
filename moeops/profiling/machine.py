"""Which machine laws were measured on, and whether it is this one."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from moeops.cost.model import CostModel

# By device: what two machines must have in common for laws of one to hold on the other.
_IDENTITY = {"cuda": ("gpu",), "cpu": ("processor", "cores")}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a profile says of the machine, for its reader and for ``check_machine``."""
    info: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_properties(device).name
    return info


def check_machine(op: str, model: CostModel, device: torch.device) -> None:
    """Refuse a cost model that was measured on another kind of machine.

    A model that was made by hand says of no machine that it is its own, and is taken.

    Args:
        op: for error messages.
        model: the cost model.
        device: where it is to be used.

    Raises:
        ValueError: it was measured on another device, GPU, processor or number of cores.
    """
    if not model.machine or device.type not in _IDENTITY:
        return
    here = describe_machine(device)
    names = ("device", *_IDENTITY[device.type])
    mine = {"device": device.type, **here}
    theirs = {"device": model.device, **model.machine}
    for name in names:
        if theirs.get(name) != mine.get(name):
            raise ValueError(
                f"{op}: cost_model must be a profile of this machine, whose {name} is {mine.get(name)!r}, got one of "
                f"{theirs.get(name)!r}. Profile this machine: torchrun --nproc-per-node=2 -m moeops profile; or leave "
                "cost_model out, and the job measures itself."
            )


def _processor() -> str:
    """The processor's name: Linux keeps it in a file, other systems tell it to Python."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
