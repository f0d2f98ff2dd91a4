"""What is tracing, where torch's own answer differs from one version to the next."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """torch.export is tracing.

    Its flag is read directly: Dynamo of torch 2.11 takes ``torch.compiler.is_exporting()`` for true in any graph.
    """
    return torch.compiler._is_exporting_flag
