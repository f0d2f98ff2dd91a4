"""What the expert block computes between its two products. R rows, H hidden width."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops.types import Glu

# Names of the options of a gated unit are those of ``Glu``; the names here stand for units without options.
GATED = {"swiglu": Glu("silu"), "geglu_tanh": Glu("gelu_tanh")}
ACTIVATIONS = (*GATED, "gelu", "relu", "silu", "relu_squared")
_NAMES = {unit.gate: name for name, unit in GATED.items()}


def check_activation(op: str, activation: object) -> None:
    """Refuse what is neither one of ``ACTIVATIONS`` nor a ``Glu`` that makes sense.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(activation, Glu):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{op}: activation must be one of {ACTIVATIONS} or a moeops.Glu, got {activation!r}. Pick one of them."
            )
        return
    if activation.gate not in _NAMES:
        raise ValueError(
            f"{op}: the gate of activation must be one of {tuple(_NAMES)}, got {activation.gate!r}. Pick one of them."
        )
    if activation.limit is not None and not activation.limit > 0:
        raise ValueError(
            f"{op}: the limit of activation must be above 0, got {activation.limit}. Pass None for no limit."
        )
    if activation.gate != "silu" and activation.alpha != 1:
        raise ValueError(
            f"{op}: the alpha of activation must be 1 with the gate {activation.gate!r}, got {activation.alpha}. "
            "Leave it out, or take the gate 'silu'."
        )


def is_gated(activation: object) -> bool:
    """Whether ``w_up`` makes a gate beside what the gate multiplies; code of the caller's own counts as no gate."""
    return isinstance(activation, Glu) or (isinstance(activation, str) and activation in GATED)


def up_width(d_hidden: int, activation: object) -> int:
    """Rows of ``w_up`` per expert: gate and up for gated units, up alone otherwise."""
    return 2 * d_hidden if is_gated(activation) else d_hidden


def op_options(activation: str | Glu) -> dict[str, Any]:
    """The arguments of ``torch.ops.moeops.moe_mlp`` for an activation, by name, in the order of the schema."""
    unit = activation if isinstance(activation, Glu) else Glu()
    return {
        "activation": _NAMES[unit.gate] if isinstance(activation, Glu) else activation,
        "alpha": unit.alpha,
        "limit": unit.limit,
        "offset": unit.offset,
        "interleaved": unit.interleaved,
    }


def _holds(dtype: torch.dtype, value: float) -> bool:
    """A type has this number; those of other types than the half ones count as having all."""
    bits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype)
    return bits is None or math.frexp(value)[0] * 2**bits % 1 == 0


def activate(pre_activation: Tensor, activation: str | Glu) -> Tensor:
    """``[R, 2H] -> [R, H]`` for gated units, elementwise for the others; composed of torch's functions."""
    if activation == "relu_squared":
        return F.relu(pre_activation).square()
    if not is_gated(activation):
        return getattr(F, activation)(pre_activation)  # type: ignore[arg-type]  # a name
    unit = activation if isinstance(activation, Glu) else GATED[activation]
    if unit.interleaved:
        gate, up = pre_activation[..., ::2], pre_activation[..., 1::2]
    else:
        gate, up = pre_activation.chunk(2, dim=-1)
    if unit.limit is not None:
        dtype = gate.dtype
        if not _holds(dtype, unit.limit):  # clamp would round the limit, and pass what is above it
            gate, up = gate.float(), up.float()
        gate, up = gate.clamp(max=unit.limit).to(dtype), up.clamp(-unit.limit, unit.limit).to(dtype)
    if unit.offset != 0:
        up = up + unit.offset
    if unit.gate == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if unit.alpha == 1:
        return F.silu(gate) * up
    return gate * (unit.alpha * gate).sigmoid() * up
