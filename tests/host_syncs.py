"""Waits of the host for a GPU, which code that is to run ahead of the device must not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_host_syncs() -> Iterator[None]:
    """Raise inside where the host waits for the device; call first what waits in its first call only."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
