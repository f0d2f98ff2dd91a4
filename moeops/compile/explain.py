"""What a cost model says of a model's layers, in words. T tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeops import _checks
from moeops.compile.walk import (
    averaged_parameters,
    exchanging_dispatchers,
    named_dispatchers,
    plain_name,
)
from moeops.compile.windows import schedule_by, windows_of
from moeops.cost.model import CostModel
from moeops.cost.pipeline import Pipeline
from moeops.cost.region import RegionPipeline
from moeops.cost.slices import plan_slices
from moeops.dispatch.base import Dispatcher

_COLUMNS = 60
_CASES = {
    1: "the gradients' all-reduce lasts longest",
    2: "the experts last longest",
    3: "the exchanges last longest",
    4: "the links inside a node last longest",
}
_LANES = {"between": "links", "inside": "inside", "device": "experts"}


def explain(
    model: nn.Module, *, cost_model: CostModel | None = None, num_tokens: int | None = None
) -> str:
    """Say of every layer in how many chunks it works, what its stages cost and how they overlap, by a cost model.

    Args:
        model: a module with expert-parallel layers, or what ``torch.compile`` made of it.
        cost_model: to price all layers; ``None`` for those that have chosen their chunks, and no times of the others.
        num_tokens: ``T`` of a rank, for this cost model; ``None`` for what the layers were told.

    Returns:
        A text: by layer its degrees and, in both directions, the times of its stages, the case of FSMoE's Algorithm 1
        and a timeline in which every column is a part of the time and holds the number of the chunk. Where gradients
        are averaged in the graph, also the slices in which "gradient_slices" would sum them.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model has no such layer, the cost model lacks a law, or times need ``num_tokens``.
    """
    op = "explain"
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{op}: model must be a torch.nn.Module, got {_checks.describe(model)}. Pass the model."
        )
    if cost_model is not None and not isinstance(cost_model, CostModel):
        raise TypeError(
            f"{op}: cost_model must be a CostModel or None, got {_checks.describe(cost_model)}. Pass "
            "moeops.distributed.CostModel.load(...)."
        )
    layers = list(named_dispatchers(model))
    if not layers:
        raise ValueError(
            f"{op}: model must have a layer with a dispatcher, such as FMoETransformerMLP, got none in "
            f"{type(model).__name__}. Pass the module that holds the layers."
        )
    texts = [
        f"{name or type(model).__name__}: {_of_layer(dispatcher, cost_model, num_tokens)}"
        for name, dispatcher in layers
    ]
    return "\n\n".join([*texts, *_slices(model, cost_model, num_tokens)])


def _of_layer(dispatcher: Dispatcher, cost_model: CostModel | None, num_tokens: int | None) -> str:
    forward, backward = dispatcher.degrees
    head = f"{_name(dispatcher)}, chunks: {forward} forward, {backward} backward"
    schedule = schedule_by(dispatcher, cost_model, num_tokens)
    if schedule is None:
        return f"{head}\n  no cost model, or no exchange that one knows"
    sizes, best = schedule.sizes, schedule.best()
    lines = [
        head,
        f"  {sizes.num_tokens} tokens, K {sizes.top_k}, {sizes.world_size} ranks, {sizes.num_expert} experts each, "
        f"{sizes.mlps.d_model} x {sizes.mlps.d_hidden}, {sizes.mlps.dtype}",
        f"  the cost model's choice: {best.forward} forward, {best.backward} backward, {_ms(best.seconds)}",
        *_direction("forward", schedule.forward, forward, schedule.forward_seconds(forward)),
        *_direction(
            "backward",
            schedule.backward_pipeline(backward, forward),
            backward,
            schedule.backward_seconds(backward, forward),
        ),
    ]
    return "\n".join(lines)


def _slices(model: nn.Module, cost_model: CostModel | None, num_tokens: int | None) -> list[str]:
    """What ``GradientSlices`` would sum behind each layer's dispatch; nothing where graphs average no gradients.

    Gradients are taken to be known in the reverse order of the model's parameters, those of a layer's gate behind it.
    """
    averaged, layers = averaged_parameters(model), exchanging_dispatchers(model)
    if not averaged or not layers:
        return []
    ranks = max(group.size for _, group in averaged.values())
    known = known_bytes(model)
    head = f"gradient slices: {_mib(sum(known))} averaged among {ranks} ranks"
    if any(schedule_by(each, cost_model, num_tokens) is None for _, each in layers):
        return [f"{head}\n  no cost model"]
    law, windows = windows_of("explain", model, cost_model, num_tokens)
    plan = plan_slices(known, (*windows, 0.0), law)
    lines = [f"{head}, alone {_ms(law.seconds(sum(known)))}"]
    for (name, _), window, size in zip(reversed(layers), windows, plan.num_bytes, strict=False):
        lines.append(
            f"  behind the dispatch of {name or type(model).__name__}: {_mib(size)}, "
            f"{_ms(law.seconds(size) if size else 0.0)} in a window of {_ms(window)}"
        )
    lines.append(
        f"  behind all layers: {_mib(plan.num_bytes[-1])}; exposed {_ms(plan.exposed_seconds)}"
    )
    return ["\n".join(lines)]


def known_bytes(model: nn.Module) -> list[float]:
    """Bytes of averaged gradients that become known before each backward of a layer, and behind all of them."""
    names = [name for name, _ in exchanging_dispatchers(model)]
    averaged = averaged_parameters(model)
    known = [0.0] * (len(names) + 1)
    passed = 0  # layers whose parameters have begun
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        inside = [place for place, layer in enumerate(names) if _is_in(plain, layer)]
        if inside:
            passed = inside[-1] + 1
        if plain in averaged:
            before = inside[-1] if inside else passed  # layers that the forward runs before it
            known[len(names) - before] += parameter.nbytes
    return known


def _is_in(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _name(dispatcher: Dispatcher) -> str:
    name = type(dispatcher).__name__.removesuffix("Dispatcher").lower()
    inner: Any = getattr(dispatcher, "inner", None)
    return f"{name}({_name(inner)})" if isinstance(inner, Dispatcher) else name


def _direction(name: str, pipeline: RegionPipeline, degree: int, seconds: float) -> list[str]:
    case = pipeline.case(degree)
    inside, weights = pipeline.all_gather, pipeline.weight_gradients
    stages = (
        ("between nodes" if inside.seconds(1) else "exchange", pipeline.all_to_all, 2),
        ("inside nodes", inside, 2),
        ("experts", pipeline.experts, 1),
        ("their weights", weights, 1),
    )
    parts = [
        f"{stage} {_ms(passes * degree * part.seconds(degree))} ({_ms(part.seconds(degree))} a chunk)"
        for stage, part, passes in stages
        if part.seconds(1) or part not in (inside, weights)
    ]
    return [
        f"  {name}: {_ms(seconds)}, case {case.number}: {_CASES[case.number]}",
        f"    {', '.join(parts)}",
        *(f"    {line}" for line in text_timeline(pipeline, degree)),
    ]


def text_timeline(pipeline: Pipeline, degree: int, columns: int = _COLUMNS) -> list[str]:
    """Draw lanes over time in characters: the number of the chunk, modulo 10, "r" for an all-reduce, "." for none.

    Args:
        pipeline: in one direction.
        degree: chunks.
        columns: characters for the whole time.

    Returns:
        A line per lane that does anything.
    """
    tasks = [task for task in pipeline.timeline(degree) if task.end > task.start]
    end = max((task.end for task in tasks), default=0.0)
    lines = []
    for lane, label in _LANES.items():
        own = [task for task in tasks if task.lane == lane]
        if not own:
            continue
        marks = ["."] * columns
        for task in own:
            first = int(task.start / end * columns)
            last = max(first + 1, round(task.end / end * columns))
            mark = "r" if task.name == "all_reduce" else str((task.chunk + 1) % 10)
            marks[first:last] = mark * (min(last, columns) - first)
        lines.append(f"{label:8}{''.join(marks)}")
    return lines


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.3f} MiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"
