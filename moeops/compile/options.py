"""The options that ``torch.compile`` takes for a model with experts on several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moeops import _checks
from moeops.comm.agreement import agreement
from moeops.comm.groups import RankGroup
from moeops.compile.degrees import SetDegrees
from moeops.compile.order import Order
from moeops.compile.passes import BEFORE_AUTOGRAD, LAST, Pass, PassList, check_hook
from moeops.compile.walk import named_dispatchers
from moeops.dispatch.degrees import Degrees, as_degrees

# In the order in which they are called, those of one hook.
PASSES: Mapping[str, type[Pass]] = {
    "degrees": SetDegrees,
    "order": Order,
}


def options(
    model: nn.Module,
    *,
    passes: Sequence[str | Pass] = tuple(PASSES),
    degrees: int | tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return what ``torch.compile(model, options=...)`` takes, so that compiled code keeps the schedule of the layers.

    ``reorder_for_peak_memory`` is off: Inductor would move every wait right behind the exchange that it waits for.

    Every rank calls this, with the same arguments: the ranks of every layer compare them.

    Args:
        model: a module with expert-parallel layers, which all ranks have built alike.
        passes: names of ``PASSES``, or passes of your own, in the order in which they are called.
        degrees: chunks of all regions of this compiled code, an int or a pair (forward, backward), in the place of what
            their layers have; see ``SetDegrees``. Eager code keeps to the layers.

    Returns:
        Options of Inductor. Change or add what you like before you pass them on.

    Raises:
        ValueError: a pass or a degree is unknown, or differs between ranks.  TypeError: ``model`` is no module, or a
        pass is neither a name nor a ``Pass``.  RuntimeError: torch has no hook for a pass, or a rank has failed.

    Example:
        >>> model = moeops.FMoETransformerMLP(4, 8, 16)
        >>> options(model)["reorder_for_peak_memory"]
        False
    """
    op = "options"
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {_checks.describe(model)}. Pass the model to be compiled."
        )
    with contextlib.ExitStack() as stack:
        settings: dict[str, Any] = {}
        for group in _groups(model):
            stack.enter_context(agreement(op, group, settings))
        settings["degrees"] = degrees
        built = [_as_pass(op, model, one) for one in passes]
        if degrees is not None:
            built = _with_degrees(op, built, as_degrees(op, degrees))
        result = _options_of(op, built)
        settings["passes"] = [(type(one).__name__, str(one.settings())) for one in built]
    return result


def _groups(model: nn.Module) -> list[RankGroup]:
    """The groups of the model's layers, each once, in the order in which all ranks find them."""
    groups = {}
    for _, dispatcher in named_dispatchers(model):
        group = None if dispatcher.built_from is None else dispatcher.built_from[1].group
        if group is not None and group.size > 1:
            groups[group.name] = group
    return list(groups.values())


def _with_degrees(op: str, built: list[Pass], degrees: Degrees) -> list[Pass]:
    """The passes, the one for degrees with these."""
    if not any(isinstance(one, SetDegrees) for one in built):
        raise ValueError(
            f'{op}: passes must have "degrees" where degrees are given, got {[type(p).__name__ for p in built]}. Add '
            "it, or drop degrees."
        )
    return [
        SetDegrees(one.agreed, degrees) if isinstance(one, SetDegrees) else one for one in built
    ]


def _options_of(op: str, built: list[Pass]) -> dict[str, Any]:
    """Options with these passes, one of ours for each of Inductor's."""
    for one in built:
        if one.hook not in (BEFORE_AUTOGRAD, LAST):
            raise ValueError(
                f"{op}: {type(one).__name__}: hook must be one of {(BEFORE_AUTOGRAD, LAST)}, got {one.hook!r}. Set it "
                "to one of these in the class."
            )
    result: dict[str, Any] = {"reorder_for_peak_memory": False}
    for hook in (BEFORE_AUTOGRAD, LAST):
        own = [one for one in built if one.hook == hook]
        if own:
            check_hook(op, hook)
            result[hook] = PassList(own)
    return result


def _as_pass(op: str, model: nn.Module, one: Any) -> Pass:
    if isinstance(one, Pass):
        return one
    if not isinstance(one, str):
        raise TypeError(
            f"{op}: a pass must be one of {tuple(PASSES)} or a moeops.compile.Pass, got {_checks.describe(one)}. Pass "
            "a name."
        )
    if one not in PASSES:
        raise ValueError(
            f"{op}: a pass must be one of {tuple(PASSES)}, got {one!r}. Use one of these names."
        )
    return PASSES[one].of_model(model)
