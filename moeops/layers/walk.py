"""Find the layers of experts in a model, name them without torch's wrappers, and hook into their routing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from moeops.layers.moe import FMoE
from moeops.types import Routing, SlotRouting

# What torch.compile, checkpoint_wrapper and FSDP1 put into the names of a module's parameters.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


def clean_name(raw: str) -> str:
    """A module's or parameter's name without what torch's wrappers put into it.

    Example:
        >>> clean_name("_orig_mod.blocks.0._checkpoint_wrapped_module.w_up")
        'blocks.0.w_up'
    """
    return _WRAPPERS.sub("", raw).lstrip(".")


def named_layers(model: nn.Module) -> Iterator[tuple[str, FMoE]]:
    """Every ``FMoE`` of a model with its clean name, the outer ones first."""
    for raw, module in model.named_modules():
        if isinstance(module, FMoE):
            yield clean_name(raw), module


def find_layers(op: str, model: Any) -> dict[str, FMoE]:
    """Every ``FMoE`` of a model by its clean name; an error where there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {type(model).__name__}. Pass the model."
        )
    layers = dict(named_layers(model))
    if not layers:
        raise ValueError(
            f"{op}: model must have an FMoE layer, got none in {type(model).__name__}. "
            "Pass the module that holds the layers."
        )
    return layers


def parameter_tags(model: nn.Module) -> dict[nn.Parameter, str]:
    """The tag of each parameter that has one: the group that reduces its gradients, see ``FMoE.mark_parallel_comm``.

    Layers say what the tags of their parameters are, whatever made these parameters. An attribute ``dp_comm`` of a
    parameter counts before that, unless a layer has set it. All of an expert that is spread over ranks has the tag of
    that expert, layers inside of it included.
    """
    said: dict[nn.Parameter, list[str]] = {}  # the inner layers' first
    kept: dict[nn.Parameter, str] = {}
    for _, layer in reversed(list(named_layers(model))):
        for module, tag in layer.comm_tags():
            outweighs = layer.moe_ranks is not None and module is layer.experts
            for parameter in module.parameters():
                said.setdefault(parameter, []).append(tag)
                if outweighs or parameter not in kept:
                    kept[parameter] = tag
    for parameter in model.parameters():
        own = getattr(parameter, "dp_comm", None)
        if own is not None and own not in said.get(parameter, ()):
            kept[parameter] = own
    return kept


class LayerHook:
    """Base of routing hooks that belong to a tool: a copy or a pickle of the model gets none of them."""

    takes_mask = True

    def __call__(
        self, layer: FMoE, x: Tensor, routing: Routing | SlotRouting, mask: Tensor | None = None
    ) -> Routing | SlotRouting | None:
        """Look at a routing; return another one or None."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _Nothing, ()


class _Nothing:
    """What is left of a tool's hook in a copied model: the tool itself stays with the first one."""

    def __call__(self, layer: FMoE, x: Tensor, routing: Routing | SlotRouting) -> None:
        return None


def add_hook(layer: FMoE, hook: LayerHook) -> None:
    """Call ``hook`` after the ones that are there."""
    layer.routing_hooks = (*layer.routing_hooks, hook)


def remove_hook(layer: FMoE, hook: LayerHook) -> None:
    """Call ``hook`` no more."""
    layer.routing_hooks = tuple(other for other in layer.routing_hooks if other is not hook)
