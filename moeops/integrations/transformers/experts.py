"""What transformers calls for a layer's experts. T tokens, K experts per token, R rows, D width, H hidden width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe

from moeops.ops import grouped_linear, moe_mlp, permute_tokens, sort_tokens, unpermute_tokens

NAME = "moeops"

# The names of moe_mlp for transformers' activations, by exact class: a subclass may compute something else.
_ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu_squared",
}
# Experts whose gate is ``act_fn(gate) * up`` in float32, which is how moe_mlp computes swiglu of half types.
_GATES_IN_FLOAT32 = ("transformers.models.beam.modeling_beam.BeamExperts",)


def register() -> None:
    """Make ``experts_implementation="moeops"`` known to transformers. Safe to call again."""
    moe.ExpertsInterface.register(NAME, moeops_experts)


def moeops_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts of a transformers layer: the function behind ``experts_implementation="moeops"``.

    Experts whose activation ``moe_mlp`` knows are one op on the weights as the module stores them, transposed or not.
    Others are permute_tokens, grouped_linear, the module's own ``_apply_gate``, grouped_linear, its norm if it has one
    and unpermute_tokens. Expert ids of ``num_experts`` and more, which expert parallelism uses for experts of other
    ranks, add nothing.

    Args:
        self: an experts module that transformers' ``use_experts_implementation`` has decorated.
        hidden_states: tokens, ``[T, D]``; cast to the dtype of the weights.
        top_k_index: chosen experts, ``[T, K]``, int64 or int32.
        top_k_weights: ``[T, K]``, any float type.

    Returns:
        ``[T, D]``, dtype of ``hidden_states``.
    Gradients: tokens, routing weights and every parameter.  Host sync: none.
    """
    gated = self.has_gate
    w_up = self.gate_up_proj if gated else self.up_proj
    w_down = self.down_proj
    b_up = b_down = None
    if self.has_bias:
        b_up = self.gate_up_proj_bias if gated else self.up_proj_bias
        b_down = self.down_proj_bias
    if self.is_transposed:  # [E, D, 2H] and [E, H, D], read where they are
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)

    plan = sort_tokens(
        top_k_index,
        self.num_experts,
        drop_out_of_range=getattr(self, "_is_expert_parallel", True),  # older versions do not say
    )
    x = hidden_states
    if not _is_autocast(
        x
    ):  # float32 tokens beside half weights: norms and residuals may be kept in float32
        x = x.to(w_up.dtype)
    activation = fused_activation(self)
    if activation is not None:
        y = moe_mlp(
            x, plan, top_k_weights, w_up, w_down, b_up=b_up, b_down=b_down, activation=activation
        )
        return y.to(hidden_states.dtype)
    rows = permute_tokens(x, plan)  # [R, D]
    rows = grouped_linear(rows, w_up, plan.expert_offsets, bias=b_up)  # [R, 2H or H]
    rows = self._apply_gate(rows) if gated else self.act_fn(rows)  # [R, H]
    rows = grouped_linear(rows.to(w_down.dtype), w_down, plan.expert_offsets, bias=b_down)
    if has_norm(self):
        rows = self.post_expert_norm(rows)
    return unpermute_tokens(rows, plan, top_k_weights).to(hidden_states.dtype)


def fused_activation(experts: Any) -> str | None:
    """What ``moe_mlp`` has to compute for these experts between its two products; None if no activation of its fits.

    The activation is read off the class of ``act_fn`` and the function behind ``_apply_gate``, not off the
    configuration: a model with a gate of its own has the same ``config.hidden_act`` as one without.
    """
    if has_norm(experts):
        return None
    activation = _ACTIVATIONS.get(type(getattr(experts, "act_fn", None)))
    if not experts.has_gate:
        return activation
    return "swiglu" if activation == "silu" and has_plain_gate(experts) else None


def has_plain_gate(experts: Any) -> bool:
    """Whether the gate is ``act_fn(first half) * second half``."""
    function = getattr(experts._apply_gate, "__func__", None)  # None where an instance has its own
    return function is moe._default_apply_gate or _full_name(type(experts)) in _GATES_IN_FLOAT32


def has_norm(experts: Any) -> bool:
    """Whether a norm follows the experts, before the routing weights."""
    return getattr(experts, "has_post_expert_norm", False)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _is_autocast(x: Tensor) -> bool:
    """Whether moeops' ops will cast their arguments themselves."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
