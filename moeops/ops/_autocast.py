"""What torch.autocast does to an op's matrix arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast float32 and half tensors to the autocast type where autocast is on for the first one's device."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
