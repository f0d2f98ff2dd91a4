"""The options that ``torch.compile`` takes for a model with experts on several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moeops import _checks
from moeops.compile.order import Order
from moeops.compile.passes import BEFORE_AUTOGRAD, LAST, Pass, PassList, check_hook

# In the order in which they are called, those of one hook.
PASSES: Mapping[str, type[Pass]] = {
    "order": Order,
}


def options(model: nn.Module, *, passes: Sequence[str | Pass] = tuple(PASSES)) -> dict[str, Any]:
    """Return what ``torch.compile(model, options=...)`` takes, so that compiled code keeps the schedule of the layers.

    ``reorder_for_peak_memory`` is off: Inductor would move every wait right behind the exchange that it waits for.

    Args:
        model: a module with expert-parallel layers, which all ranks have built alike.
        passes: names of ``PASSES``, or passes of your own, in the order in which they are called.

    Returns:
        Options of Inductor. Change or add what you like before you pass them on.

    Raises:
        ValueError: a pass is unknown.  TypeError: ``model`` is no module, or a pass is neither a name nor a ``Pass``.
        RuntimeError: torch has no hook for a pass.

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
    built = [_as_pass(op, model, one) for one in passes]
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
