"""Find the dispatchers of a model, whose layers are a floor above."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from moeops.dispatch.base import Dispatcher


def named_dispatchers(model: nn.Module) -> Iterator[tuple[str, Dispatcher]]:
    """Every layer's dispatcher, by the layer's name without torch.compile's part of it, the outer ones first."""
    for name, module in model.named_modules():
        dispatcher = getattr(module, "dispatcher", None)
        if isinstance(dispatcher, Dispatcher):
            parts = (part for part in name.split(".") if part != "_orig_mod")
            yield ".".join(parts), dispatcher
