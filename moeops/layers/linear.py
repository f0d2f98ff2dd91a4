"""One linear layer per expert. R rows, E experts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeops import _checks
from moeops.layers._weights import plain_weight
from moeops.ops.grouped_linear import grouped_linear

INITS = ("linear", "fastmoe")


def init_linear_(weight: Tensor, bias: Tensor | None, init: str = "linear") -> None:
    """Initialise ``[E, out, in]`` and ``[E, out]``.

    "linear" draws both as nn.Linear does, with the fan-in of one expert, ``in``. "fastmoe" draws weights with ``in *
    out`` for the fan-in, which makes them ``sqrt(out)`` times smaller, and sets biases to zero.
    """
    fan_in = weight.shape[2] * (weight.shape[1] if init == "fastmoe" else 1)
    bound = 1 / math.sqrt(fan_in)
    with torch.no_grad():
        weight.uniform_(-bound, bound)
        if bias is None:
            return
        if init == "fastmoe":
            bias.zero_()
        else:
            bias.uniform_(-bound, bound)


def check_init(op: str, init: object) -> None:
    """``init`` is a name of ``init_linear_``."""
    if init not in INITS:
        raise ValueError(f"{op}: init must be one of {INITS}, got {init!r}. Pick one of them.")


class FMoELinear(nn.Module):
    """Multiply each expert's rows by that expert's own matrix.

    Departures from FastMoE's layer of the same name: every expert starts like an ``nn.Linear`` unless ``init`` says
    otherwise, the counts may live on the device, and outside autocast a type mismatch is an error instead of a silent
    cast.

    Args:
        num_expert: ``E``.
        in_feat: columns of a row.
        out_feat: columns of the result.
        bias: give each expert a bias.
        rank: kept as an attribute, without a meaning here.
        init: "linear", or "fastmoe" for FastMoE's start: weights ``sqrt(out_feat)`` times smaller, biases zero.
        dtype: type of the parameters, torch's default if ``None``.
        device: device of the parameters, torch's default if ``None``.

    Attributes:
        weight: ``[E, out_feat, in_feat]``.
        bias: ``[E, out_feat]`` or ``None``.

    Raises:
        ValueError: a size is below 1.  TypeError: a size is not an int.

    Example:
        >>> layer = FMoELinear(2, 4, 3)
        >>> layer(torch.randn(5, 4), torch.tensor([2, 3])).shape
        torch.Size([5, 3])
    """

    bias: Tensor | None

    def __init__(
        self,
        num_expert: int,
        in_feat: int,
        out_feat: int,
        bias: bool = True,
        rank: int = 0,
        *,
        init: str = "linear",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_expert", num_expert),
            ("in_feat", in_feat),
            ("out_feat", out_feat),
        ):
            _checks.check_int("FMoELinear", name, size, 1, "Sizes are at least 1.")
        self.num_expert = num_expert
        self.in_feat = in_feat
        self.out_feat = out_feat
        self.rank = rank
        check_init("FMoELinear", init)
        self.init = init
        empty: dict[str, Any] = {"dtype": dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat, **empty))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_expert, out_feat, **empty))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters as ``init`` says."""
        init_linear_(self.weight, self.bias, self.init)

    def forward(self, inp: Tensor, fwd_expert_count: Tensor) -> Tensor:
        """Apply each expert to its rows.

        Args:
            inp: rows in expert order, ``[R, in_feat]``.
            fwd_expert_count: rows per expert, ``[E]``, any integer type; their sum is at most ``R``. Counts on the
                device of ``inp`` are not copied to the host and their values not checked there.

        Returns:
            ``[R, out_feat]``; rows past the last expert's are zero.

        Raises:
            ValueError: a shape does not fit, or counts on the CPU are negative or more than the rows.
            TypeError: a dtype is wrong.
        """
        if not torch.compiler.is_compiling():
            self._check(inp, fwd_expert_count)
        counts = fwd_expert_count.to(device=inp.device, non_blocking=True)
        expert_offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))  # [E + 1]
        weight = plain_weight("FMoELinear", "weight", self.weight)
        bias = plain_weight("FMoELinear", "bias", self.bias)
        return grouped_linear(inp, weight, expert_offsets, bias=bias)

    def _check(self, inp: Tensor, counts: Tensor) -> None:
        op = "FMoELinear"
        _checks.check_tensor(op, "inp", inp, 2)
        _checks.check_float(op, "inp", inp)
        _checks.check_size(op, "inp", inp, 1, self.in_feat, "in_feat")
        _checks.check_tensor(op, "fwd_expert_count", counts, 1)
        if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise TypeError(
                f"{op}: fwd_expert_count must be an integer tensor, got {_checks.describe(counts)}. "
                "Cast it with .to(torch.int64)."
            )
        _checks.check_size(op, "fwd_expert_count", counts, 0, self.num_expert, "one per expert")
        if counts.device.type == "cpu" and (
            bool((counts < 0).any()) or int(counts.sum()) > inp.shape[0]
        ):
            raise ValueError(
                f"{op}: fwd_expert_count must be at least 0 with a sum of at most the {inp.shape[0]} rows of inp, "
                f"got {counts.tolist()}. Count the rows of each expert."
            )

    def extra_repr(self) -> str:
        """Sizes of the layer."""
        return (
            f"num_expert={self.num_expert}, in_feat={self.in_feat}, out_feat={self.out_feat}, "
            f"bias={self.bias is not None}"
        )
