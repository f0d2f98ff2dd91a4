"""For how long the links of gradients are idle behind each layer's dispatch, on which all ranks agree. T tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from moeops.comm.agreement import everywhere
from moeops.comm.groups import RankGroup
from moeops.compile.walk import averaged_parameters, exchanging_dispatchers, layer_groups
from moeops.cost.laws import BytesLaw
from moeops.cost.model import CostModel
from moeops.cost.schedule import Schedule, schedule_of
from moeops.dispatch.base import Dispatcher
from moeops.dispatch.degrees import Degrees
from moeops.profiling.machine import check_machine


class Windows(NamedTuple):
    """What ``GradientSlices`` is made of.

    Attributes:
        law: seconds of an all-reduce by the bytes of its tensors.
        seconds: of each layer's window, in the order of the backward: the last layer of the model first.
    """

    law: BytesLaw
    seconds: tuple[float, ...]


def schedule_by(
    dispatcher: Dispatcher, cost_model: CostModel | None, num_tokens: int | None
) -> Schedule | None:
    """A layer's schedule by a cost model, or by the one that has chosen its chunks; ``None`` where neither knows it.

    Raises:
        ValueError: the cost model lacks a law, or needs ``num_tokens``.
    """
    if cost_model is None:
        return dispatcher.schedule
    if dispatcher.built_from is None:
        return None
    options, ranks = dispatcher.built_from
    auto = options.auto_chunks(ranks.op)
    sizes = options.layer_sizes(ranks, num_tokens or (auto.num_tokens if auto else None))
    return None if sizes is None else schedule_of(sizes, cost_model)


def averaging_groups(model: nn.Module) -> list[RankGroup]:
    """Groups over which the graph averages gradients, small ones first; the last one is the largest."""
    groups = {group.name: group for _, group in averaged_parameters(model).values()}
    return sorted(groups.values(), key=lambda group: group.size)


def windows_of(
    op: str,
    model: nn.Module,
    cost_model: CostModel | None = None,
    num_tokens: int | None = None,
    degrees: Degrees | None = None,
) -> Windows:
    """Price the windows of a model's layers by this rank's cost model.

    Args:
        op: for error messages.
        model: whose gradients are averaged in the graph.
        cost_model: for all layers; ``None`` for those that have chosen the layers' chunks.
        num_tokens: ``T`` of a rank, for this cost model; ``None`` for what the layers were told.
        degrees: chunks of all layers; ``None`` for their own.

    Raises:
        ValueError: nothing is averaged in the graph, no layer exchanges rows, or no cost model knows one of them.
    """
    groups, layers = averaging_groups(model), exchanging_dispatchers(model)
    if not groups or not layers:
        lacking = "no layer that exchanges rows" if groups else "none that is"
        raise ValueError(
            f'{op}: gradients must be averaged in the graph, beside layers on several ranks, for "gradient_slices", '
            f"got {lacking}. Compile moeops.distributed.DistributedGroupedDataParallel(model, in_graph=True), or leave "
            "the pass out."
        )
    seconds, law = [], None
    for name, dispatcher in reversed(layers):
        schedule = schedule_by(dispatcher, cost_model, num_tokens)
        if schedule is None:
            raise ValueError(
                f'{op}: cost_model must know every layer for "gradient_slices", got none that knows {name!r}. Pass '
                "cost_model= and num_tokens=, build layers with n_chunks=AutoChunks(...), or pass "
                "moeops.compile.GradientSlices(law, windows)."
            )
        forward, backward = degrees or dispatcher.degrees
        seconds.append(schedule.backward_pipeline(backward, forward).window(backward))
        law = law or schedule.model.all_reduce_law(groups[-1].size)
    assert law is not None
    return Windows(law, tuple(seconds))


def agreed_windows(
    op: str,
    model: nn.Module,
    cost_model: CostModel | None,
    num_tokens: int | None,
    degrees: Degrees | None,
) -> Windows:
    """``windows_of`` the first rank of each group of layers, and then of gradients, the largest group last.

    So ranks agree that exchange rows with each other, and ranks that sum gradients. All of them call it.

    Raises:
        ValueError: see ``windows_of``; the cost model is of another machine.  RuntimeError: a rank has failed.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    agreed: Windows | None = None

    def mine() -> Windows:
        if agreed is not None:
            return agreed
        if cost_model is not None and device is not None:
            check_machine(op, cost_model, device)
        return windows_of(op, model, cost_model, num_tokens, degrees)

    for group in (*layer_groups(model), *averaging_groups(model)):
        agreed = everywhere(op, group, mine, device)[0]
    return mine()
