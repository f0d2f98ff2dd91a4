"""State dicts in which the experts of all ranks are DTensors, for torch's own tools. E experts, E_local on a rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeops.comm.groups import RankGroup
from moeops.layers._state import as_dtensor, has_experts, own_experts
from moeops.layers.walk import clean_name, named_layers


def use_dtensor_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Have state dicts hold the experts that are spread over ranks as DTensors, from this call on.

    ``model.state_dict()`` then has ``[E, ...]``, sharded in dimension 0 over the layer's ``moe_group``, in the place of
    this rank's ``[E_local, ...]``, and so has the state of an optimizer. The memory is that of the parameters, which
    stay plain tensors. ``torch.distributed.checkpoint``, ``get_state_dict`` with full state dicts, and ``load`` on
    another number of ranks then work as for torch's own sharded modules. ``load_state_dict`` takes DTensors, whole
    tensors ``[E, ...]``, of which each rank takes its own, and this rank's ``[E_local, ...]``.

    Without it ``torch.distributed.checkpoint`` refuses experts that are spread over ranks. It cannot refuse the state
    of an optimizer, so pass that here before it is saved.

    Args:
        model: holds ``moeops.FMoE`` layers with fused experts, as ``FMoETransformerMLP`` has.
        optimizer: trains the model.

    Raises:
        NotImplementedError: experts on several ranks are modules, shards, or sharded by FSDP2; or a tensor of theirs
        has not the experts in dimension 0. ``save_checkpoint`` takes them.
    """
    layers = [(layer, layer.moe_ranks) for _, layer in named_layers(model)]
    spread = [(layer, group) for layer, group in layers if group is not None]
    for layer, _ in spread:
        _check(layer)
    for layer, _ in spread:
        layer.dtensor_state = True
    if optimizer is None:
        return
    groups = {p: group for layer, group in spread for p in layer.experts.parameters()}
    optimizer.register_state_dict_post_hook(lambda own, state: _give(own, state, groups))
    optimizer.register_load_state_dict_pre_hook(lambda own, state: _take(own, state, groups))


def _check(layer: Any) -> None:
    """Refuse experts that are no tensors with the experts in dimension 0."""
    op = "use_dtensor_state"
    if not layer.experts_fused or layer.expert_tensor_parallel_size > 1:
        kind = "modules" if not layer.experts_fused else "shards of experts"
        raise NotImplementedError(
            f"{op}: experts must be whole and fused, got {kind} in {type(layer).__name__}. Use "
            "moeops.distributed.save_checkpoint."
        )
    for name, tensor in (*layer.experts.named_parameters(), *layer.experts.named_buffers()):
        if hasattr(tensor, "device_mesh"):
            raise NotImplementedError(
                f"{op}: experts must not be sharded by FSDP2, got {name} on {tensor.device_mesh}. Use "
                "moeops.distributed.save_checkpoint."
            )
        if not has_experts(layer.experts, clean_name(name), tensor, layer.num_expert):
            raise NotImplementedError(
                f"{op}: tensors of experts must have the rank's {layer.num_expert} experts in dimension 0, got {name} "
                f"{list(tensor.shape)}. Use moeops.distributed.save_checkpoint."
            )


def _members(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], groups: dict[Any, RankGroup]
) -> Any:
    """The entries of an optimizer's state dict that belong to experts: values of a parameter, and its group."""
    for group, packed in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for parameter, key in zip(group["params"], packed["params"], strict=True):
            if parameter in groups and key in state["state"]:
                yield parameter, state["state"][key], groups[parameter]


def _give(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], groups: dict[Any, RankGroup]
) -> dict[str, Any]:
    """State of experts as DTensors."""
    state["state"] = {key: dict(values) for key, values in state["state"].items()}
    for parameter, values, group in _members(optimizer, state, groups):
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape[0] != parameter.shape[0]:
                raise NotImplementedError(
                    "use_dtensor_state: optimizer state of experts must be a number or have the rank's "
                    f"{parameter.shape[0]} experts in dimension 0, got {name} {list(value.shape)}. Use "
                    "moeops.distributed.save_checkpoint."
                )
            values[name] = as_dtensor(value, group)
    return state


def _take(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], groups: dict[Any, RankGroup]
) -> dict[str, Any]:
    """State of experts as plain tensors."""
    state = {**state, "state": {key: dict(values) for key, values in state["state"].items()}}
    for parameter, values, group in _members(optimizer, state, groups):
        for name, value in values.items():
            values[name] = own_experts(value, parameter, group)
    return state
