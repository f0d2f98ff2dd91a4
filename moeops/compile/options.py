"""The options that ``torch.compile`` takes for a model with experts on several ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from moeops import _checks
from moeops.comm.agreement import agreement
from moeops.compile.degrees import SetDegrees
from moeops.compile.gradient_slices import GradientSlices
from moeops.compile.order import Order
from moeops.compile.passes import BEFORE_AUTOGRAD, LAST, Pass, PassList, check_hook
from moeops.compile.walk import averaged_parameters, exchanging_dispatchers, layer_groups
from moeops.compile.windows import Windows, agreed_windows, schedule_by
from moeops.cost.model import CostModel
from moeops.dispatch.degrees import Degrees, as_degrees

# In the order in which they are called, those of one hook: ranks compare the order that the others have left.
PASSES: Mapping[str, type[Pass]] = {
    "degrees": SetDegrees,
    "gradient_slices": GradientSlices,
    "order": Order,
}


def options(
    model: nn.Module,
    *,
    passes: Sequence[str | Pass] | None = None,
    degrees: int | tuple[int, int] | None = None,
    cost_model: CostModel | None = None,
    num_tokens: int | None = None,
) -> dict[str, Any]:
    """Return what ``torch.compile(model, options=...)`` takes, so that compiled code keeps the schedule of the layers.

    ``reorder_for_peak_memory`` is off: Inductor would move every wait right behind the exchange that it waits for.

    Every rank calls this, with the same arguments: the ranks of every layer compare them, but for the cost model, of
    which the first rank's decides.

    Args:
        model: a module with expert-parallel layers, which all ranks have built alike.
        passes: names of ``PASSES``, or passes of your own, in the order in which they are called; ``None`` for all of
            ``PASSES``, "gradient_slices" only where the model averages gradients in the graph and a cost model knows
            all its layers.
        degrees: chunks of all regions of this compiled code, an int or a pair (forward, backward), in the place of what
            their layers have; see ``SetDegrees``. Eager code keeps to the layers.
        cost_model: what "gradient_slices" decides by; ``None`` for the models that have chosen the layers' chunks.
        num_tokens: ``T`` of a rank, for this cost model; ``None`` for what the layers were told.

    Returns:
        Options of Inductor. Change or add what you like before you pass them on.

    Raises:
        ValueError: a pass or a degree is unknown, or differs between ranks; "gradient_slices" has nothing to decide
        by.  TypeError: ``model`` is no module, or a pass is neither a name nor a ``Pass``.  RuntimeError: torch has no
        hook for a pass, or a rank has failed.

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
    with _agreement(op, model) as settings:
        _check_cost_model(op, cost_model)
        chosen = _default_passes(model, cost_model, num_tokens) if passes is None else passes
        settings["degrees"] = degrees
        settings["passes"] = [_name_of(op, one) for one in chosen]
        given = None if degrees is None else as_degrees(op, degrees)
        if any(one == "gradient_slices" or isinstance(one, GradientSlices) for one in chosen):
            GradientSlices.check(model)
    windows = None
    if "gradient_slices" in chosen:
        windows = agreed_windows(op, model, cost_model, num_tokens, given)
    with _agreement(op, model) as settings:
        built = [_as_pass(model, one, windows) for one in chosen]
        if given is not None:
            built = _with_degrees(op, built, given)
        result = _options_of(op, built)
        settings["passes"] = [(type(one).__name__, str(one.settings())) for one in built]
    return result


@contextlib.contextmanager
def _agreement(op: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Settings that the ranks of every layer compare behind the block; if it fails on one rank, it fails on all."""
    settings: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for group in layer_groups(model):
            stack.enter_context(agreement(op, group, settings))
        yield settings


def _check_cost_model(op: str, cost_model: Any) -> None:
    if cost_model is not None and not isinstance(cost_model, CostModel):
        raise TypeError(
            f"{op}: cost_model must be a CostModel or None, got {_checks.describe(cost_model)}. Pass "
            "moeops.distributed.CostModel.load(...)."
        )


def _default_passes(
    model: nn.Module, cost_model: CostModel | None, num_tokens: int | None
) -> list[str]:
    """All, but for slices where there is nothing to put into them or nothing to decide by."""
    layers = exchanging_dispatchers(model)
    in_slices = bool(layers and averaged_parameters(model)) and all(
        schedule_by(dispatcher, cost_model, num_tokens) is not None for _, dispatcher in layers
    )
    return [name for name in PASSES if in_slices or name != "gradient_slices"]


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


def _name_of(op: str, one: Any) -> str:
    """What ranks call a pass when they compare; raise for what is none."""
    if isinstance(one, Pass):
        return type(one).__name__
    if not isinstance(one, str):
        raise TypeError(
            f"{op}: a pass must be one of {tuple(PASSES)} or a moeops.compile.Pass, got {_checks.describe(one)}. Pass "
            "a name."
        )
    if one not in PASSES:
        raise ValueError(
            f"{op}: a pass must be one of {tuple(PASSES)}, got {one!r}. Use one of these names."
        )
    return one


def _as_pass(model: nn.Module, one: str | Pass, windows: Windows | None) -> Pass:
    if isinstance(one, Pass):
        return one
    if one == "gradient_slices":
        assert windows is not None
        return GradientSlices(*windows)
    return PASSES[one].of_model(model)
