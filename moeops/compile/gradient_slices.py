"""Gradients of data parallelism are summed in slices, each beside the experts of a layer.

Source: Pan et al. 2025, arXiv:2501.10714, section 5, and Li et al. 2023 (Lina), arXiv:2210.17223. W ranks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.parallel import DistributedDataParallel

from moeops.comm.peer import PEER_OPS
from moeops.compile.order import group_of
from moeops.compile.passes import LAST, Pass, set_value
from moeops.compile.walk import averaged_parameters
from moeops.cost.laws import BytesLaw
from moeops.cost.slices import UNITS, bytes_within, plan_slices

_COLLECTIVES = torch.ops._c10d_functional
_REDUCE = _COLLECTIVES.all_reduce.default
_WAIT = _COLLECTIVES.wait_tensor.default
_EXCHANGES = (
    _COLLECTIVES.all_to_all_single.default,
    _COLLECTIVES.all_gather_into_tensor.default,
    _COLLECTIVES.reduce_scatter_tensor.default,
    *PEER_OPS,
)
# What may stand between a gradient that was waited for and the output of the graph: nothing that needs another tensor.
_CASTS = (
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.view.default,
)
# Of a gradient that is cut: the parts of a smaller one cost more than they hide.
MIN_PART_BYTES = 1 << 20


class Reduction(NamedTuple):
    """A gradient's all-reduce as autograd has written it.

    Attributes:
        start: the all-reduce.
        wait: for it.
        tail: casts and views of the sum, up to what the graph returns.
    """

    start: Node
    wait: Node
    tail: tuple[Node, ...]

    @property
    def value(self) -> Node:
        """What is summed."""
        return self.start.args[0]  # type: ignore[return-value]  # a Node

    @property
    def num_bytes(self) -> int:
        """Of the gradient."""
        return self.value.meta["val"].nbytes


class Region(NamedTuple):
    """The backward of a layer that exchanges rows.

    Attributes:
        dispatch: the last exchange that brings gradients to experts.
        combine: the last exchange of the layer.
    """

    dispatch: Node
    combine: Node


class _Part(NamedTuple):
    """Rows of a gradient, or all of it."""

    reduction: Reduction
    start: int
    stop: int | None  # None for all of it


class GradientSlices(Pass):
    """Sum dense gradients in slices behind the last dispatch of the next layer's backward.

    Gradients are those that ``DistributedGroupedDataParallel(in_graph=True)`` averages: all-reduces whose result goes
    to the output of the graph and nowhere else. A layer with experts is found by its exchanges, which have Dynamo's
    record of their module: those that no other exchange of the module comes before are dispatch.

    Before::

        sum_1 = all_reduce(grad_1); done_1 = wait_tensor(sum_1)      # of the layer above
        sum_2 = all_reduce(grad_2); done_2 = wait_tensor(sum_2)
        sent = all_to_all_single(rows); rows = wait_tensor(sent)     # dispatch of the backward
        back = all_to_all_single(experts_backward(rows)); ...        # combine
        return done_1, done_2, ...

    After::

        sent = all_to_all_single(rows)
        sum_1, sum_2 = all_reduce_coalesced([grad_1, grad_2])
        rows = wait_tensor(sent)
        back = all_to_all_single(experts_backward(rows)); ...
        done_1 = wait_tensor(sum_1); done_2 = wait_tensor(sum_2)
        return done_1, done_2, ...

    A slice holds what is known by then, as much as its window has time for: ``plan_slices`` divides the gradients. A
    gradient that is larger than what is left of a slice is cut into rows, of 1 MiB at least. What no slice has room for
    is summed behind the last layer's combine, and what becomes known after that at the end. Sums are of the same
    numbers over the same ranks, so results are equal but for the order in which a backend adds ranks up. Only
    all-reduces and their waits move, and with the former what divides and views a gradient before it is sent: autograd
    does that at the end. A graph without layers or without gradients is left as it is, and so is an
    all-reduce whose result is read in the graph.

    Args:
        law: seconds of an all-reduce by the bytes of its tensors, the same on all ranks: ``CostModel.all_reduce_law``.
            ``None`` puts everything that is known into each slice.
        windows: seconds for which the links of gradients are idle behind each layer's last dispatch, as
            ``Pipeline.window`` has them, in the order of the backward; one number for all layers. Without a law they
            are not read.

    Raises:
        ValueError: in the pass, where windows are not as many as the graph's layers; a window is negative.
    """

    hook = LAST

    def __init__(self, law: BytesLaw | None = None, windows: float | Sequence[float] = 0.0) -> None:
        self.law = law
        self.windows = (
            tuple(map(float, windows)) if isinstance(windows, Sequence) else float(windows)
        )
        values = self.windows if isinstance(self.windows, tuple) else (self.windows,)
        if any(not value >= 0 for value in values):
            raise ValueError(
                f"GradientSlices: windows must be at least 0, got {windows}. Pass seconds, 0 for a layer that hides "
                "nothing."
            )

    @staticmethod
    def check(model: nn.Module) -> None:
        """Refuse a model in which DDP reduces gradients by itself that are, or could be, averaged in the graph.

        DDP that was told to skip those of ``DistributedGroupedDataParallel(in_graph=True)`` is none of this.
        """
        in_graph = {parameter for parameter, _ in averaged_parameters(model).values()}
        for name, module in model.named_modules():
            if not isinstance(module, DistributedDataParallel):
                continue
            skipped = getattr(module, "parameters_to_ignore", ())
            own = dict(module.named_parameters(prefix="")).items()
            reduced = {p for n, p in own if n.removeprefix("module.") not in skipped}
            if reduced & in_graph or not in_graph.intersection(module.parameters()):
                raise ValueError(
                    f"GradientSlices: gradients must be averaged in the graph, got DistributedDataParallel as "
                    f"{name or 'the model'!r}, which averages them by itself. Use "
                    "moeops.distributed.DistributedGroupedDataParallel(model, in_graph=True) in its place, or tell DDP "
                    "to ignore what that averages."
                )

    def settings(self) -> tuple[Any, ...]:
        """Law and windows."""
        return self.law, self.windows

    def rewrite(self, graph: Graph) -> int:
        """Move the reductions of a backward graph; return how many gradients were moved."""
        regions, reductions = find_regions(graph), list(find_reductions(graph))
        if not regions or not reductions:
            return 0
        for one in reversed(reductions):
            _compute_early(graph, one.value)
        places = {node: place for place, node in enumerate(graph.nodes)}
        regions.sort(key=lambda region: places[region.dispatch])
        reductions.sort(key=lambda one: places[one.value])
        parts = [_Part(one, 0, None) for one in reductions]
        slices, rest = self._divide(parts, [places[region.dispatch] for region in regions], places)
        done: dict[Reduction, list[tuple[int, Node]]] = {}
        for region, chosen in zip(regions, slices, strict=True):
            _sum(graph, region.dispatch, chosen, done)
        combine = regions[-1].combine
        early = [part for part in rest if places[part.reduction.value] < places[combine]]
        _sum(graph, combine, early, done)
        late = [part for part in rest if part not in early]
        if late:
            _sum(graph, late[-1].reduction.value, late, done)
        output = next(node for node in graph.nodes if node.op == "output")
        for one in reductions:
            _finish(graph, output, one, done[one])
        return len(reductions)

    def _divide(
        self, parts: list[_Part], slots: list[int], places: dict[Node, int]
    ) -> tuple[list[list[_Part]], list[_Part]]:
        """What each slice holds, and the rest, in the order in which gradients become known."""
        rooms = self._rooms(parts, slots, places)
        queue = list(parts)
        slices: list[list[_Part]] = []
        short = 0.0  # bytes that earlier slices had room for and no whole row fitted into
        for slot, (room, most) in zip(slots, rooms, strict=True):
            chosen: list[_Part] = []
            left = max(room, min(room + short, most))
            short += room
            while queue and places[queue[0].reduction.value] < slot:
                head, remainder = _cut(queue[0], left)
                if head is None:
                    break
                chosen.append(head)
                left -= _part_bytes(head)
                short -= _part_bytes(head)
                queue[:1] = [] if remainder is None else [remainder]
            slices.append(chosen)
        return slices, queue

    def _rooms(
        self, parts: list[_Part], slots: list[int], places: dict[Node, int]
    ) -> list[tuple[float, float]]:
        """Bytes that each slice is to hold, and that its window has time for."""
        if self.law is None:
            return [(math.inf, math.inf)] * len(slots)
        windows = self.windows if isinstance(self.windows, tuple) else (self.windows,) * len(slots)
        if len(windows) != len(slots):
            raise ValueError(
                f"GradientSlices: windows must be one for each of the {len(slots)} layers with experts in the "
                f"backward, got {len(windows)}. Pass as many, the last layer's first, or one number for all."
            )
        known = [0.0] * (len(slots) + 1)
        for part in parts:
            place = places[part.reduction.value]
            known[sum(slot <= place for slot in slots)] += part.reduction.num_bytes
        plan = plan_slices(known, (*windows, 0.0), self.law)
        slack = sum(known) / UNITS  # what a plan in whole units may be short of
        return [
            (num_bytes + slack if num_bytes else 0.0, bytes_within(self.law, window))
            for num_bytes, window in zip(plan.num_bytes[:-1], windows, strict=True)
        ]


def find_regions(graph: Graph) -> list[Region]:
    """Every module call whose backward exchanges rows there and back, by Dynamo's record of the forward's modules."""
    by_call: dict[Any, list[Node]] = {}
    earlier: dict[
        Node, frozenset[Any]
    ] = {}  # calls with an exchange among what a node is computed from
    dispatches: dict[Any, Node] = {}
    for node in graph.nodes:
        before = frozenset[Any]().union(*(earlier[source] for source in node.all_input_nodes))
        stack = node.meta.get("fwd_nn_module_stack")
        if node.target in _EXCHANGES and stack:
            call = next(reversed(stack))
            by_call.setdefault(call, []).append(node)
            if call not in before:
                dispatches[call] = node
            before |= {call}
        earlier[node] = before
    return [
        Region(dispatches[call], nodes[-1])
        for call, nodes in by_call.items()
        if nodes[-1] is not dispatches[call]
    ]


def find_reductions(graph: Graph) -> Iterator[Reduction]:
    """Every all-reduce whose sum the graph returns and does not read."""
    for node in graph.nodes:
        if node.target is not _REDUCE or node.args[1] != "sum" or len(node.users) != 1:
            continue
        wait = next(iter(node.users))
        tail: list[Node] = []
        last = wait
        while len(last.users) == 1 and (user := next(iter(last.users))).target in _CASTS:
            tail.append(user)
            last = user
        if wait.target is _WAIT and all(user.op == "output" for user in last.users):
            yield Reduction(node, wait, tuple(tail))


def _compute_early(graph: Graph, value: Node) -> None:
    """Move a gradient's last steps, such as the division by ranks, to where what they start from is known.

    Autograd runs them last, as what the forward has begun with.
    """
    steps: list[Node] = []
    while len(value.all_input_nodes) == 1 and _is_pure(value) and len(value.users) == 1:
        steps.append(value)
        value = value.all_input_nodes[0]
    if value.op == "placeholder":
        *_, value = (node for node in graph.nodes if node.op == "placeholder")
    for step in reversed(steps):
        value.append(step)
        value = step


def _is_pure(node: Node) -> bool:
    """Computes a tensor of tensors and nothing else."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and not target._schema.is_mutable
    )


def _cut(part: _Part, room: float) -> tuple[_Part | None, _Part | None]:
    """As much of a part as there is room for, and the remainder."""
    if _part_bytes(part) <= room:
        return part, None
    row_bytes, num_rows = _rows(part.reduction)
    rows = int(room // row_bytes) if row_bytes else 0
    stop = num_rows if part.stop is None else part.stop
    enough = min(rows, stop - part.start - rows) * row_bytes >= MIN_PART_BYTES
    if not enough:
        return None, part
    middle = part.start + rows
    return part._replace(stop=middle), part._replace(start=middle, stop=stop)


def _rows(reduction: Reduction) -> tuple[int, int]:
    """Bytes of a row of a gradient and number of rows; 0 where it has none."""
    value = reduction.value.meta["val"]
    if value.dim() == 0 or value.shape[0] == 0:
        return 0, 0
    return value.nbytes // value.shape[0], value.shape[0]


def _part_bytes(part: _Part) -> int:
    if part.stop is None:
        return part.reduction.num_bytes
    return (part.stop - part.start) * _rows(part.reduction)[0]


def _sum(
    graph: Graph, behind: Node, parts: list[_Part], done: dict[Reduction, list[tuple[int, Node]]]
) -> None:
    """Begin the sums of some parts behind a node, one collective for each group and type; note where they come out."""
    together: dict[Any, list[_Part]] = {}
    for part in parts:
        start = part.reduction.start
        together.setdefault((group_of(start), start.meta["val"].dtype), []).append(part)
    for (group, _), same in together.items():
        with graph.inserting_after(behind):
            behind = _begin(graph, behind, group, same, done)


def _begin(
    graph: Graph,
    behind: Node,
    group: str,
    parts: list[_Part],
    done: dict[Reduction, list[tuple[int, Node]]],
) -> Node:
    """One collective; the last node of it."""
    last = behind

    def add(target: Callable[..., Any], *args: Any) -> Node:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.call_function(target, args)
        set_value(last, parts[0].reduction.value, lambda: target(*_values(args)))
        return last

    values = []
    for part in parts:
        value = part.reduction.value
        if part.stop is not None:
            value = add(torch.ops.aten.slice.Tensor, value, 0, part.start, part.stop)
        values.append(value)
    if len(values) == 1:
        sums = [add(_REDUCE, values[0], "sum", group)]
    else:
        every = add(_COLLECTIVES.all_reduce_coalesced.default, values, "sum", group)
        sums = [add(operator.getitem, every, place) for place in range(len(values))]
    for part, node in zip(parts, sums, strict=True):
        done.setdefault(part.reduction, []).append((part.start, node))
    return last


def _finish(graph: Graph, output: Node, reduction: Reduction, sums: list[tuple[int, Node]]) -> None:
    """Wait for a gradient's sums before the output, in the place of the old wait."""
    with graph.inserting_before(output):
        waits = []
        for _, node in sorted(sums, key=lambda pair: pair[0]):
            wait = graph.call_function(_WAIT, (node,))
            wait.meta["val"] = node.meta["val"]
            waits.append(wait)
        whole = waits[0]
        if len(waits) > 1:
            whole = graph.call_function(torch.ops.aten.cat.default, (waits, 0))
            whole.meta["val"] = reduction.wait.meta["val"]
    for node in reduction.tail:
        output.prepend(node)
    reduction.wait.replace_all_uses_with(whole)
    graph.erase_node(reduction.wait)
    graph.erase_node(reduction.start)


def _values(args: Any) -> Any:
    return torch.fx.map_arg(args, lambda node: node.meta["val"])
