"""What tools that hook into every FMoE layer of a model share: finding the layers, and hooks that stay behind."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from moeops.layers.moe import FMoE
from moeops.types import Routing, SlotRouting

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


def find_layers(op: str, model: Any) -> dict[str, FMoE]:
    """Every ``FMoE`` of a model by its name there, without what torch's wrappers put into names."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {type(model).__name__}. Pass the model."
        )
    layers = {
        _WRAPPERS.sub("", name).lstrip("."): module
        for name, module in model.named_modules()
        if isinstance(module, FMoE)
    }
    if not layers:
        raise ValueError(
            f"{op}: model must have an FMoE layer, got none in {type(model).__name__}. "
            "Pass the module that holds the layers."
        )
    return layers


class LayerHook:
    """Base of routing hooks that belong to a tool: a copy or a pickle of the model gets none of them."""

    def __call__(
        self, layer: FMoE, x: Tensor, routing: Routing | SlotRouting
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
