"""Experts that transformers offers no implementation for: one forward each, on the model's own parameters.

T tokens, K experts per token, R rows, E experts, D width, H hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeops.integrations.transformers.experts import gated_unit, run_experts
from moeops.ops import grouped_linear, permute_tokens, sort_tokens, unpermute_tokens


class Patch(NamedTuple):
    """What replaces the forward of a class.

    Attributes:
        forward: the function, same arguments and results.
        layout: shapes and order in which the weights are stored.
        fused: whether it is one op with a SiLU.
        reason: what is special.
    """

    forward: Callable
    layout: str
    fused: bool
    reason: str


def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama4TextMoe: sigmoid of the chosen logits, multiplied into what the experts see."""
    x = hidden_states.reshape(-1, self.hidden_dim)  # [T, D]
    scores, logits = self.router(x)  # [T, E]; scores of experts that were not chosen are 0
    topk_ids = logits.topk(self.top_k, dim=1).indices  # [T, K]
    weights = scores.gather(1, topk_ids)
    # The inputs of a token's experts differ, so each pair is a token of its own with one expert.
    pairs = (x[:, None] * weights[:, :, None]).flatten(0, 1)  # [T * K, D]
    experts = self.experts
    y = run_experts(
        pairs,
        sort_tokens(topk_ids.reshape(-1, 1), self.num_experts),
        torch.ones_like(weights).reshape(-1, 1),
        experts.gate_up_proj.transpose(1, 2),
        experts.down_proj.transpose(1, 2),
        activation=gated_unit(experts.act_fn),
        between=functools.partial(_glu, experts.act_fn),
    )
    return self.shared_expert(x) + y.unflatten(0, weights.shape).sum(1), logits


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DbrxExperts: gate and up are two weights ``[E * H, D]``, and down is stored like them."""
    mlp = self.mlp
    w_gate, w_up, w_down = (
        w.view(self.num_experts, self.ffn_hidden_size, self.hidden_size)
        for w in (mlp.w1, mlp.v1, mlp.w2)
    )
    x = hidden_states.reshape(-1, self.hidden_size)  # [T, D]
    plan = sort_tokens(top_k_index, self.num_experts, drop_out_of_range=True)
    rows, offsets = permute_tokens(x, plan), plan.expert_offsets
    gate = mlp.activation_fn(grouped_linear(rows, w_gate, offsets))
    hidden = gate * grouped_linear(rows, w_up, offsets)  # [R, H]
    rows = grouped_linear(hidden, w_down.transpose(1, 2), offsets)
    y = unpermute_tokens(rows, plan, top_k_weights).to(hidden_states.dtype)
    return y.view(hidden_states.shape[0], -1, self.hidden_size)


def _longcat_flash(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """LongcatFlashExperts: experts from ``num_routed_experts`` on return what they are given."""
    num_experts = self.num_routed_experts
    identity = top_k_weights.masked_fill(top_k_index < num_experts, 0).sum(1, keepdim=True)
    y = (hidden_states * identity).to(hidden_states.dtype)
    if self.gate_up_proj is None:
        return y
    plan = sort_tokens(top_k_index, num_experts, drop_out_of_range=True)
    return y + run_experts(
        hidden_states,
        plan,
        top_k_weights,
        self.gate_up_proj[:num_experts],
        self.down_proj,
        activation=gated_unit(self.act_fn),
        between=functools.partial(_glu, self.act_fn),
    )


def _step3p7(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Step3p7Experts: the gate is clamped after its activation."""
    plan = sort_tokens(top_k_index, self.num_experts, drop_out_of_range=True)
    return run_experts(
        hidden_states,
        plan,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        activation=None,
        between=self._apply_gate,
    )


def _jetmoe_gating(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
    """JetMoeTopKGating: offsets on the device in the place of a list of sizes on the host."""
    logits = self.layer(hidden_states).float()  # [T, E]
    topk_logits, topk_ids = logits.topk(self.top_k, dim=1)
    weights = torch.softmax(topk_logits, dim=1).type_as(hidden_states).flatten()  # [T * K]
    plan = sort_tokens(topk_ids, self.num_experts)
    pairs = plan.row_to_pair.long()
    return pairs, pairs // self.top_k, weights[pairs], plan.expert_offsets, logits


def _jetmoe_linear(self: Any, inputs: Tensor, expert_size: Tensor) -> Tensor:
    """JetMoeParallelExperts: ``expert_size`` is what the patched gating returns, offsets."""
    return grouped_linear(inputs, self.weight, expert_size)


def _glu(act_fn: nn.Module, rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return act_fn(gate) * up


PATCHES = {
    "llama4.modeling_llama4.Llama4TextMoe": Patch(
        _llama4,
        "[E, D, 2H], gate then up",
        True,
        "routing weights on the inputs, for the chosen experts and not for all",
    ),
    "dbrx.modeling_dbrx.DbrxExperts": Patch(
        _dbrx, "[E * H, D], gate and up apart", False, "gate and up are two weights"
    ),
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": Patch(
        _longcat_flash, "[E, 2H, D], gate then up", True, "identity experts beside one op"
    ),
    "step3p7.modeling_step3p7.Step3p7Experts": Patch(
        _step3p7, "[E, 2H, D], gate then up", False, "a gate of its own (clamped after the SiLU)"
    ),
    "jetmoe.modeling_jetmoe.JetMoeTopKGating": Patch(
        _jetmoe_gating, "[E, D]", False, "a plan of rows in the place of sizes on the host"
    ),
    "jetmoe.modeling_jetmoe.JetMoeParallelExperts": Patch(
        _jetmoe_linear, "[E, H, D]", False, "one grouped_linear"
    ),
}


def patch(model: nn.Module) -> list[str]:
    """Run the experts of models on moeops for which transformers takes no experts implementation.

    These are llama4, dbrx, longcat_flash, step3p7 and jetmoe. Each affected module gets a subclass of its class with
    another forward: parameters, their names and checkpoints stay. Safe to call again.

    Args:
        model: a transformers model, or any part of one; changed in place.

    Returns:
        Names of the modules that run on moeops because of this function, also those of an earlier call.

    Raises:
        ValueError: the model has no such module. One with ``experts_implementation`` needs no patch.
    """
    names = []
    for name, module in model.named_modules():
        found = find_patch(module)
        if found is None:
            continue
        if not is_patched(module):
            module.__class__ = _patched_class(type(module), found.forward)  # type: ignore[arg-type]  # a Module
        names.append(name)
    if not names:
        known = ", ".join(sorted({path.split(".")[0] for path in PATCHES}))
        raise ValueError(
            f"patch: model must have experts of {known}, got {type(model).__name__} without any. "
            'Call set_experts_implementation("moeops") where transformers takes an experts implementation.'
        )
    return names


def find_patch(module: nn.Module) -> Patch | None:
    """The patch of a module's class, patched or not."""
    cls = type(module).__base__ if is_patched(module) else type(module)
    assert cls is not None
    return PATCHES.get(f"{cls.__module__}.{cls.__qualname__}".removeprefix("transformers.models."))


def is_patched(module: nn.Module) -> bool:
    """Whether ``patch`` has changed the module."""
    return "is_moeops" in vars(type(module))


@functools.cache
def _patched_class(cls: type, forward: Callable) -> type:
    return type(
        cls.__name__, (cls,), {"forward": forward, "is_moeops": True, "__doc__": cls.__doc__}
    )
