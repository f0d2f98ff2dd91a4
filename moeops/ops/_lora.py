"""Low-rank additions to experts' matrices, on rows. R rows, E experts, D inputs, H outputs, r rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks
from moeops.types import LoraFactors


def add_lora(out: Tensor, rows: Tensor, lora: LoraFactors, expert_offsets: Tensor) -> Tensor:
    """``out + scaling * b[e] @ a[e] @ dropout(row)`` for every row of expert ``e``: two products with ``[R, r]``."""
    if lora.dropout > 0:
        rows = F.dropout(rows, lora.dropout)
    linear = torch.ops.moeops.grouped_linear
    low = linear(rows, lora.a.to(rows.dtype), expert_offsets)  # [R, r]
    return out + linear(low * lora.scaling, lora.b.to(rows.dtype), expert_offsets)


def check_lora(op: str, name: str, lora: object, weight_name: str, weight: Tensor) -> None:
    """The factors fit the weight ``[E, H, D]``."""
    if not isinstance(lora, tuple) or not 2 <= len(lora) <= 4:
        raise TypeError(
            f"{op}: {name} must be (a, b, scaling) or a LoraFactors, got {_checks.describe(lora)}. Pass the factors "
            "of all experts."
        )
    factors = LoraFactors(*lora)
    for part, factor, own, size in (
        ("a", factors.a, 2, weight.shape[2]),
        ("b", factors.b, 1, weight.shape[1]),
    ):
        _checks.check_tensor(op, f"{name}.{part}", factor, 3)
        _checks.check_float(op, f"{name}.{part}", factor)
        _checks.check_device(op, f"{name}.{part}", factor, weight_name, weight)
        _checks.check_size(op, f"{name}.{part}", factor, 0, weight.shape[0], "one per expert")
        what = "inputs" if part == "a" else "outputs"
        _checks.check_size(op, f"{name}.{part}", factor, own, size, f"{what} of {weight_name}")
    _checks.check_size(op, f"{name}.b", factors.b, 2, factors.a.shape[1], f"the rank of {name}.a")
    if not 0 <= factors.dropout <= 1:
        raise ValueError(
            f"{op}: {name}.dropout must be between 0 and 1, got {factors.dropout}. Pass a probability."
        )
