"""What torch.autocast does to an op's matrix arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cast_for_autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast float32 and half tensors to the autocast type where autocast is on for the first one's device."""
    tensors = (first, *others)
    device = first.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
