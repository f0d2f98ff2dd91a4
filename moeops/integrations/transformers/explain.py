"""What happens in each experts layer of a model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from moeops.integrations.transformers.experts import (
    NAME,
    fused_activation,
    has_norm,
    has_plain_gate,
)
from moeops.integrations.transformers.patches import Patch, find_patch, is_patched
from moeops.ops.activations import GATED
from moeops.types import Glu


class ExpertsReport(NamedTuple):
    """One experts layer of a model. ``str()`` makes a line of it.

    Attributes:
        name: of the module in the model.
        class_name: of the module.
        implementation: what transformers calls there: "moeops", "eager", "grouped_mm" ...
        fused: whether moeops computes the layer as one op. If ``implementation`` is another: whether it would.
        activation: what ``moe_mlp`` computes between the products; None where the module's own code runs.
        reason: why it is fused or composed.
        layout: shapes and order in which the weights are stored.
        is_expert_parallel: whether transformers has spread the experts over ranks.
    """

    name: str
    class_name: str
    implementation: str
    fused: bool
    activation: str | Glu | None
    reason: str
    layout: str
    is_expert_parallel: bool

    def __str__(self) -> str:
        how = "fused" if self.fused else "composed"
        if self.implementation != NAME:
            how = f"{self.implementation} runs ({NAME}: {how})"
        parallel = ", expert parallel" if self.is_expert_parallel else ""
        return f"{self.name} ({self.class_name}): {how}, {self.reason}; {self.layout}{parallel}"


def explain(model: nn.Module) -> list[ExpertsReport]:
    r"""Say for each experts layer of a transformers model whether moeops runs it as one op, why, and on which layout.

    Args:
        model: a transformers model, or any part of one.

    Returns:
        One report per layer that takes an experts implementation, or that ``patch`` knows, in the model's order.

    Example:
        >>> print(*explain(model), sep="\n")  # doctest: +SKIP
        model.layers.0.mlp.experts (Qwen3MoeExperts): fused, silu(gate) * up; [E, 2H, D], gate then up
    """
    reports = []
    for name, module in model.named_modules():
        if is_experts(module):
            reports.append(_report(name, module))
        elif (found := find_patch(module)) is not None:
            reports.append(_patch_report(name, module, found))
    return reports


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` decorated the module's class."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def _report(name: str, experts: Any) -> ExpertsReport:
    activation = fused_activation(experts)
    return ExpertsReport(
        name,
        type(experts).__name__,
        str(experts.config._experts_implementation),
        activation is not None,
        activation,
        _reason(experts, activation),
        _layout(experts),
        getattr(experts, "_is_expert_parallel", False),
    )


def _patch_report(name: str, module: nn.Module, found: Patch) -> ExpertsReport:
    patched = is_patched(module)
    return ExpertsReport(
        name,
        type(module).__name__,
        NAME if patched else "eager",
        found.fused,
        "swiglu" if found.fused else None,
        found.reason if patched else f"{found.reason}; call patch(model)",
        found.layout,
        False,
    )


def _reason(experts: Any, activation: str | Glu | None) -> str:
    if has_norm(experts):
        return "a norm follows the experts (post_expert_norm)"
    function = type(getattr(experts, "act_fn", None)).__name__
    if not experts.has_gate:
        return f"no gate, {activation}" if activation else f"no gate, {function} is not in moe_mlp"
    if activation:
        return _formula(activation)
    if not has_plain_gate(experts):
        return f"a gate of its own ({type(experts)._apply_gate.__qualname__})"
    return f"a gated {function} is not in moe_mlp"


def _formula(activation: str | Glu) -> str:
    """What a gated unit computes."""
    unit = activation if isinstance(activation, Glu) else GATED[activation]
    gate = f"{unit.gate}(gate)"
    if unit.alpha != 1:
        gate = f"gate * sigmoid({unit.alpha:g} * gate)"
    up = f"(up + {unit.offset:g})" if unit.offset else "up"
    limit = "" if unit.limit is None else f", both clamped at {unit.limit:g}"
    return f"{gate} * {up}{limit}"


def _layout(experts: Any) -> str:
    width = "2H" if experts.has_gate else "H"
    layout = f"[E, D, {width}]" if experts.is_transposed else f"[E, {width}, D]"
    if experts.has_gate:
        layout += ", gate then up" if experts.is_concatenated else ", gate and up interleaved"
    return layout + (", bias" if experts.has_bias else "")
