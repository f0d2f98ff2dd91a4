"""What transformers calls for a layer's experts. T tokens, K experts per token, R rows, D width, H hidden width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe

from moeops.layers._weights import plain_weight
from moeops.ops import grouped_linear, moe_mlp, permute_tokens, sort_tokens, unpermute_tokens
from moeops.ops.activations import GATED
from moeops.types import Glu, LoraFactors, TokenPlan

NAME = "moeops"
# The attribute in which moeops.integrations.peft leaves LoRA factors for a call: a dict of LoraFactors by weight.
LORA = "_moeops_lora"

# The names of moe_mlp for transformers' activations, by exact class: a subclass may compute something else.
_ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu_squared",
}
# What moe_mlp makes of one of them before a gate; GELUTanh is the tanh form of GELU, however it is computed.
_GATED: dict[type, str | Glu] = {
    nn.SiLU: "swiglu",
    activations.SiLUActivation: "swiglu",
    activations.GELUTanh: "geglu_tanh",
    activations.NewGELUActivation: "geglu_tanh",
    activations.QuickGELUActivation: Glu(alpha=1.702),
}


def _clamped_by_act_fn(experts: Any) -> Glu | None:
    return Glu(limit=experts.limit) if gated_unit(experts.act_fn) == "swiglu" else None


def _clamped(experts: Any) -> Glu:
    return Glu(limit=experts.swiglu_limit)


def _gpt_oss(experts: Any) -> Glu:
    return Glu(
        alpha=experts.alpha,
        limit=experts.limit,
        offset=1.0,
        interleaved=not experts.is_concatenated,
    )


def _minimax(experts: Any) -> Glu:
    return Glu(alpha=experts.swiglu_alpha, limit=experts.swiglu_limit, offset=1.0)


def _by_act_fn(experts: Any) -> str | Glu | None:
    return gated_unit(experts.act_fn)


# Gates that models bring, by the module and name of the function: what they compute. Beam's is ``act_fn(gate) * up`` in
# float32, which is how moe_mlp computes it for half types.
_GATES: dict[str, Callable[[Any], str | Glu | None]] = {
    "transformers.models.beam.modeling_beam.BeamExperts._apply_gate": _by_act_fn,
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts._apply_gate": _clamped_by_act_fn,
    "transformers.models.glm5_next.modeling_glm5_next.Glm5NextTextExperts._apply_gate": _clamped,
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts._apply_gate": _gpt_oss,
    "transformers.models.hy_v4.modeling_hy_v4.HYV4Experts._apply_gate": _clamped,
    "transformers.models.hy_v4_vl.modeling_hy_v4_vl.HYV4VLExperts._apply_gate": _clamped,
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts._apply_gate": _minimax,
    "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts"
    "._apply_gate": _gpt_oss,
}


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
    ranks, add nothing. LoRA factors that ``moeops.integrations.peft`` has left on the module are applied to rows.

    Args:
        self: an experts module that transformers' ``use_experts_implementation`` has decorated.
        hidden_states: tokens, ``[T, D]``; cast to the dtype of the weights.
        top_k_index: chosen experts, ``[T, K]``, int64 or int32.
        top_k_weights: ``[T, K]``, any float type.

    Returns:
        ``[T, D]``, dtype of ``hidden_states``.
    Gradients: tokens, routing weights and every parameter.  Host sync: none.
    """
    plan = sort_tokens(
        top_k_index,
        self.num_experts,
        drop_out_of_range=getattr(self, "_is_expert_parallel", True),  # older versions do not say
    )
    return run_module(self, hidden_states, plan, top_k_weights)


def run_module(experts: Any, x: Tensor, plan: TokenPlan, topk_weights: Tensor) -> Tensor:
    """Run an experts module of transformers on tokens ``[T, D]`` whose plan is known; result as ``moeops_experts``."""
    gated = experts.has_gate
    w_up, w_down = (
        plain_weight(type(experts).__name__, name, getattr(experts, name))
        for name in (up_name(experts), "down_proj")
    )
    b_up = b_down = None
    if experts.has_bias:
        b_up = experts.gate_up_proj_bias if gated else experts.up_proj_bias
        b_down = experts.down_proj_bias
    if experts.is_transposed:  # [E, D, 2H] and [E, H, D], read where they are
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)

    lora = getattr(experts, LORA, {})
    return run_experts(
        x,
        plan,
        topk_weights,
        w_up,
        w_down,
        activation=fused_activation(experts),
        between=experts._apply_gate if gated else experts.act_fn,
        after=experts.post_expert_norm if has_norm(experts) else None,
        b_up=b_up,
        b_down=b_down,
        lora_up=lora.get(up_name(experts)),
        lora_down=lora.get("down_proj"),
    )


def run_experts(
    x: Tensor,
    plan: TokenPlan,
    topk_weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str | Glu | None,
    between: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    lora_up: LoraFactors | None = None,
    lora_down: LoraFactors | None = None,
) -> Tensor:
    """Run tokens ``[T, D]`` through experts as one op where ``activation`` says what it computes, else composed.

    Args:
        x: tokens, ``[T, D]``; cast to the dtype of the weights.
        plan: what ``sort_tokens`` returned for their experts.
        topk_weights: ``[T, K]``, any float type.
        w_up: ``[E, 2H or H, D]``, any strides.
        w_down: ``[E, D, H]``, any strides.
        activation: one of ``moe_mlp``'s, or None.
        between: the model's own code between the products, ``[R, 2H or H] -> [R, H]``; for ``activation=None``.
        after: the model's own code on the rows that come out, for ``activation=None``.
        b_up: ``[E, 2H or H]``.
        b_down: ``[E, D]``.
        lora_up: factors that are added to ``w_up``.
        lora_down: factors that are added to ``w_down``.

    Returns:
        ``[T, D]``, dtype of ``x``.
    """
    dtype = x.dtype
    if not _is_autocast(
        x
    ):  # float32 tokens beside half weights: norms and residuals may be kept in float32
        x = x.to(w_up.dtype)
    if activation is not None:
        y = moe_mlp(
            x,
            plan,
            topk_weights,
            w_up,
            w_down,
            b_up=b_up,
            b_down=b_down,
            activation=activation,
            lora_up=lora_up,
            lora_down=lora_down,
        )
        return y.to(dtype)
    offsets = plan.expert_offsets
    rows = permute_tokens(x, plan)  # [R, D]
    rows = between(grouped_linear(rows, w_up, offsets, bias=b_up, lora=lora_up))  # [R, H]
    rows = grouped_linear(rows.to(w_down.dtype), w_down, offsets, bias=b_down, lora=lora_down)
    if after is not None:
        rows = after(rows)
    return unpermute_tokens(rows, plan, topk_weights).to(dtype)


def fused_activation(experts: Any) -> str | Glu | None:
    """What ``moe_mlp`` has to compute for these experts between its two products; None if no activation of its fits.

    The activation is read off the class of ``act_fn`` and the function behind ``_apply_gate``, not off the
    configuration: a model with a gate of its own has the same ``config.hidden_act`` as one without.
    """
    if has_norm(experts):
        return None
    act_fn = getattr(experts, "act_fn", None)
    if not experts.has_gate:
        return activation_name(act_fn)
    if has_plain_gate(experts):
        unit = gated_unit(act_fn)
        if unit is None or experts.is_concatenated:
            return unit
        return (unit if isinstance(unit, Glu) else GATED[unit])._replace(interleaved=True)
    function = getattr(experts._apply_gate, "__func__", None)  # None where an instance has its own
    known = _GATES.get(f"{function.__module__}.{function.__qualname__}") if function else None
    return known(experts) if known else None


def activation_name(function: object) -> str | None:
    """The name that ``moe_mlp`` has for one of transformers' activations."""
    return _ACTIVATIONS.get(type(function))


def gated_unit(function: object) -> str | Glu | None:
    """What ``moe_mlp`` has for ``function(gate) * up`` with one of transformers' activations."""
    return _GATED.get(type(function))


def up_name(experts: Any) -> str:
    """The name of the weight of the first product."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def has_plain_gate(experts: Any) -> bool:
    """Whether the gate is ``act_fn(first half) * second half``."""
    return getattr(experts._apply_gate, "__func__", None) is moe._default_apply_gate


def has_norm(experts: Any) -> bool:
    """Whether a norm follows the experts, before the routing weights."""
    return getattr(experts, "has_post_expert_norm", False)


def _is_autocast(x: Tensor) -> bool:
    """Whether moeops' ops will cast their arguments themselves."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
