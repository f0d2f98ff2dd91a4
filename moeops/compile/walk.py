"""Find the dispatchers of a model and what it averages in the graph: its layers and wrappers are floors above."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from moeops.comm.groups import RankGroup
from moeops.dispatch.base import Dispatcher


def named_dispatchers(model: nn.Module) -> Iterator[tuple[str, Dispatcher]]:
    """Every layer's dispatcher, by the layer's name without torch.compile's part of it, the outer ones first."""
    for name, module in model.named_modules():
        dispatcher = getattr(module, "dispatcher", None)
        if isinstance(dispatcher, Dispatcher):
            yield plain_name(name), dispatcher


def exchanging_dispatchers(model: nn.Module) -> list[tuple[str, Dispatcher]]:
    """Those of ``named_dispatchers`` whose rows go to other ranks."""
    return [pair for pair in named_dispatchers(model) if _group(pair[1]) is not None]


def layer_groups(model: nn.Module) -> list[RankGroup]:
    """The groups of the model's layers, each once, in the order in which all ranks find them."""
    groups = {}
    for _, dispatcher in named_dispatchers(model):
        group = _group(dispatcher)
        if group is not None:
            groups[group.name] = group
    return list(groups.values())


def _group(dispatcher: Dispatcher) -> RankGroup | None:
    """The ranks that share the experts, if there are several."""
    group = None if dispatcher.built_from is None else dispatcher.built_from[1].group
    return group if group is not None and group.size > 1 else None


def averaged_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, RankGroup]]:
    """Parameters whose gradients are averaged by ops of the backward, by their names and in the order of the model.

    ``DistributedGroupedDataParallel(in_graph=True)`` says which, and which ranks average them.
    """
    groups: dict[nn.Parameter, RankGroup] = {}
    for module in model.modules():
        averaged = getattr(module, "averaged_in_graph", None)
        if isinstance(averaged, dict):
            for name, group in averaged.items():
                groups[module.module.get_parameter(name)] = group  # type: ignore[union-attr]  # the model
    return {
        plain_name(name): (parameter, groups[parameter])
        for name, parameter in model.named_parameters()
        if parameter in groups
    }


def plain_name(name: str) -> str:
    """A name without what ``torch.compile`` adds to it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
