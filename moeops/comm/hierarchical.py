"""All-to-all in stages, inside nodes and between them. W ranks on M nodes of L ranks, R rows, W = M * L.

A rank's place in the group is ``node * L + local``. Rows travel in blocks, one per pair of ranks; a stage sends the
blocks that share a next stop together, so that few long messages leave a node instead of many short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moeops import _checks
from moeops.comm.agreement import agreement
from moeops.comm.exchange import (
    AllToAll,
    Exchange,
    Splits,
    all_to_all_rows,
    check_splits,
    exchange_counts,
    exchange_detached,
)
from moeops.comm.groups import ALONE, RankGroup, describe_group, rank_group, timeout_of
from moeops.comm.wires import TwoHops, pack_rows, unpack_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FORMS = ("2d", "leader")


class Hierarchy(NamedTuple):
    """A group whose ranks are arranged as nodes, in plain numbers. ``build_hierarchy`` makes it.

    Attributes:
        group: all ``W`` ranks.
        inside: the ``L`` ranks of this rank's node; ``group`` itself where there is one node.
        across: the ``M`` ranks with this rank's place in their nodes; ``group`` itself where nodes have one rank.
        form: "2d" or "leader", see ``hierarchical_all_to_all``.
    """

    group: RankGroup
    inside: RankGroup
    across: RankGroup
    form: str = "2d"

    @property
    def node_size(self) -> int:
        """``L``."""
        return self.inside.size

    @property
    def num_nodes(self) -> int:
        """``M``."""
        return self.group.size // self.inside.size

    @property
    def is_flat(self) -> bool:
        """One node, or nodes of one rank: there is one stage, the flat exchange."""
        return self.node_size in (1, self.group.size)

    @property
    def num_middle(self) -> int:
        """Number of blocks whose sizes this rank must know beside those that it sends and receives."""
        size = self.group.size
        if self.is_flat:
            return 0
        if self.form == "2d":
            return size
        return 2 * size * self.node_size if self.inside.rank == 0 else 0


def build_hierarchy(
    group: ProcessGroup | RankGroup | None, node_size: int, form: str = "2d"
) -> Hierarchy:
    """Arrange the ranks of a group as nodes, and make the groups inside a node and between nodes.

    Every rank of the group must call it, in the same order among its calls. One hierarchy serves any number of
    layers: with NCCL each holds two communicators, so build one and share it. ``hierarchy._replace(form=...)`` is the
    other form on the same groups.

    Args:
        group: the ranks, ``rank_group`` of them, or ``None`` for this rank alone.
        node_size: ``L``, ranks per node; rank ``r`` of the group is on node ``r // L``.
        form: "2d" or "leader", see ``hierarchical_all_to_all``.

    Returns:
        The hierarchy; the groups in it have the time-out and the backend of ``group``.

    Raises:
        ValueError: on every rank, where ``node_size`` does not divide ``W`` or differs between ranks, or ``form`` is
        unknown.  TypeError: an argument has the wrong type.  RuntimeError: it failed on another rank.

    Example:
        >>> build_hierarchy(None, 1).num_nodes
        1
    """
    op = "build_hierarchy"
    whole = rank_group(group) or ALONE
    settings = {"node_size": node_size, "form": form}
    with agreement(op, whole if whole.size > 1 else None, settings):
        _checks.check_int(op, "node_size", node_size, 1, "Pass the ranks per node.")
        if whole.size % node_size != 0:
            raise ValueError(
                f"{op}: node_size must divide the number of ranks, got {node_size} and {describe_group(whole)}. Nodes "
                "must have equal numbers of ranks."
            )
        _check_form(op, form)
    if node_size == whole.size:
        return Hierarchy(whole, whole, ALONE, form)
    if node_size == 1:
        return Hierarchy(whole, ALONE, whole, form)
    inside, across = _sub_groups(op, whole, node_size)
    return Hierarchy(whole, inside, across, form)


def hierarchical_all_to_all(
    rows: Tensor,
    input_splits: Sequence[int] | None,
    output_splits: Sequence[int] | None,
    hierarchy: Hierarchy,
    form: str | None = None,
    *,
    middle_splits: Sequence[int] | None = None,
) -> Tensor:
    """Do what ``all_to_all_rows`` does, to the bit, in stages: inside the nodes and between them.

    "2d": the ranks of a node exchange rows so that local rank ``l`` holds all that goes to local ranks ``l``; then
    ranks with the same place in their nodes exchange these. Every rank sends ``M`` messages between nodes, ``L`` times
    as long, instead of ``W``.

    "leader": each node gathers its rows on its local rank 0; these leaders exchange, and scatter. One message travels
    between each two nodes. It suits nodes with one network card; the leader holds the rows of the whole node.

    With one node, or nodes of one rank, both are the flat exchange.

    Args:
        rows: ``[R, ...]``, any dtype; the same dtype and row shape on every rank.
        input_splits: ``W`` numbers of rows to send, 0 included; their sum is ``R``. May be symbolic. ``None``, on
            every rank, for parts of equal size; ``R`` is then the same on every rank.
        output_splits: ``W`` numbers of rows to receive; ``None`` with ``input_splits``.
        hierarchy: what ``build_hierarchy`` returned for the ranks.
        form: "2d" or "leader", the hierarchy's form if ``None``; the same on every rank.
        middle_splits: what ``hierarchical_counts`` returned with the counts, as numbers. ``None``, on every rank, to
            send ``input_splits`` first.

    Returns:
        ``[sum(output_splits), ...]``, dtype of ``rows``.

    Raises:
        ValueError: the splits do not fit the group or the rows.  TypeError: ``rows`` is not a tensor.  RuntimeError: a
        rank did not take part within the group's time-out.
    Gradients: ``rows``, if its type is float or complex.  Host sync: none with ``middle_splits`` or equal parts, else
    one copy.  Deterministic: yes.
    Source: "2d" Hwang et al. 2023, arXiv:2206.03382; "leader" Nie et al. 2022, arXiv:2203.14685.

    Example:
        >>> rows = torch.tensor([[1.0], [2.0]])
        >>> hierarchical_all_to_all(rows, [2], [2], build_hierarchy(None, 1)).tolist()
        [[1.0], [2.0]]
    """
    op, group = "hierarchical_all_to_all", hierarchy.group
    if form is not None:
        _check_form(op, form)
        hierarchy = hierarchy._replace(form=form)
    equal = input_splits is None
    if equal != (output_splits is None):
        raise ValueError(
            f"{op}: output_splits must be None exactly where input_splits is, got {input_splits} and {output_splits}. "
            "Pass both, or none for parts of equal size."
        )
    if input_splits is None or output_splits is None:
        _checks.check_tensor(op, "rows", rows, None)
        if not torch.compiler.is_compiling() and (rows.dim() == 0 or rows.shape[0] % group.size):
            raise ValueError(
                f"{op}: rows must be a multiple of the {group.size} ranks of group {group.name!r} in number, got "
                f"{_checks.describe(rows)} on rank {group.rank}. Pass input_splits and output_splits."
            )
        input_splits = output_splits = [rows.shape[0] // group.size] * group.size
    elif not torch.compiler.is_compiling():
        check_splits(op, rows, input_splits, output_splits, group)
    if hierarchy.is_flat:
        return all_to_all_rows(rows, input_splits, output_splits, group)
    if equal:
        middle_splits = [input_splits[0]] * hierarchy.num_middle
    elif middle_splits is None:
        middle_splits = _ask_for_middle(rows, input_splits, hierarchy)
    elif len(middle_splits) != hierarchy.num_middle:
        raise ValueError(
            f"{op}: middle_splits must have {hierarchy.num_middle} entries for form={hierarchy.form!r} on rank "
            f"{group.rank} of {group.size}, got {len(middle_splits)}. Take them from hierarchical_counts."
        )
    splits = Splits(input_splits, output_splits, middle_splits, equal)
    return HierarchicalExchange(rows, splits, hierarchy).finish()


def hierarchical_counts(counts: Tensor, hierarchy: Hierarchy) -> tuple[Tensor, Tensor]:
    """Do what ``exchange_counts`` does in stages, and keep the counts of the stages between.

    Args:
        counts: ``[W, ...]``, entry ``r`` for the group's rank ``r``; same shape and dtype on every rank.
        hierarchy: what ``build_hierarchy`` returned for the ranks.

    Returns:
        Entry ``r`` from rank ``r``, ``[W, ...]``, and the counts of other ranks that pass through this one,
        ``[hierarchy.num_middle, ...]``; dtype of ``counts``.

    Raises:
        ValueError: there is not one entry per rank.  TypeError: ``counts`` is not a tensor.  RuntimeError: a rank did
        not take part within the group's time-out.
    Gradients: none, the results are detached.  Host sync: none.  Deterministic: yes.

    Example:
        >>> received, middle = hierarchical_counts(torch.tensor([[3, 1]]), build_hierarchy(None, 1))
        >>> received.tolist(), middle.tolist()
        ([[3, 1]], [])
    """
    op, counts = "hierarchical_counts", counts.detach()
    if hierarchy.is_flat:
        return exchange_counts(counts, hierarchy.group), counts[:0].clone()
    ones = [1] * hierarchy.group.size
    if not torch.compiler.is_compiling():
        check_splits(op, counts, ones, ones, hierarchy.group)
    middles = []
    for step in _steps(Splits(ones, ones, [1] * hierarchy.num_middle, True), hierarchy):
        if isinstance(step, _Swap):
            counts = step.apply(counts)
        else:
            counts = exchange_detached(
                op, counts, step.input_splits, step.output_splits, step.group
            )
            middles.append(counts)
    return counts, torch.cat(middles[:-1])


class HierarchicalExchange:
    """Rows on their way to other ranks in stages, as ``Exchange`` for the flat way.

    Construction waits for what comes before the stage between nodes, and begins that one; ``finish`` waits for it and
    does the rest. So the slow stage is the one in flight.

    Args:
        rows: ``[R, ...]``.
        splits: of the way there, not checked.
        hierarchy: the ranks, neither one node nor nodes of one rank.
        back: take rows that the exchange with these splits brought back to where they came from, by its stages in
            reverse: nothing but the splits of the way there has to be known.
    """

    def __init__(
        self, rows: Tensor, splits: Splits, hierarchy: Hierarchy, *, back: bool = False
    ) -> None:
        steps = _steps(splits, hierarchy)
        if back:
            steps = [step.back() for step in reversed(steps)]
        self._dtype = rows.dtype
        rows = pack_rows(rows)
        self._begun: Exchange | None = None
        # Ranks that are no leaders have no stage between nodes. They too must end the gather here and leave the
        # scatter to finish: where chunks are in flight, the order of a node's collectives depends on it.
        while True:
            step = steps.pop(0)
            if isinstance(step, _Leg) and step.group == hierarchy.across:
                self._begun = step.start(rows)
                break
            rows = step.apply(rows)
            if hierarchy.form == "leader" and hierarchy.inside.rank != 0:
                break
        self._rows = rows
        self._rest = steps

    def finish(self) -> Tensor:
        """Return the rows that the other ranks sent."""
        rows = self._rows if self._begun is None else self._begun.finish()
        for step in self._rest:
            rows = step.apply(rows)
        return unpack_rows(rows, self._dtype)


def start_exchange(
    rows: Tensor,
    splits: Splits,
    group: RankGroup,
    hierarchy: Hierarchy | None,
    *,
    back: bool = False,
) -> Exchange | HierarchicalExchange:
    """Begin an exchange, flat where there is no hierarchy; ``back`` as for ``HierarchicalExchange``."""
    if hierarchy is None or hierarchy.is_flat:
        sends, receives = splits.input_splits, splits.output_splits
        return Exchange(rows, *((receives, sends) if back else (sends, receives)), group)
    return HierarchicalExchange(rows, splits, hierarchy, back=back)


def send_in_two_hops(
    rows: Tensor, splits: Splits, hierarchy: Hierarchy, *, back: bool = False
) -> TwoHops:
    """Begin an exchange in the form "2d" without gradients: inside the node first, and last where rows go back.

    Args:
        rows: ``[R, ...]``.
        splits: of the way there, not checked.
        hierarchy: the ranks, in the form "2d", neither one node nor nodes of one rank.
        back: as for ``HierarchicalExchange``.
    """
    steps = _steps(splits, hierarchy)
    if back:
        first, middle, second, end = (step.back() for step in reversed(steps))
        assert isinstance(first, _Leg)
        assert isinstance(second, _Leg)
        return TwoHops(rows, first.wire(), middle.apply, second.wire(), end.apply)
    begin, first, middle, second = steps
    assert isinstance(first, _Leg)
    assert isinstance(second, _Leg)
    return TwoHops(begin.apply(rows), first.wire(), middle.apply, second.wire())


class _Swap(NamedTuple):
    """Rows in ``outer * inner`` blocks, to be brought from the order (outer, inner) to (inner, outer)."""

    outer: int
    inner: int
    sizes: Sequence[int]
    equal: bool

    def apply(self, rows: Tensor) -> Tensor:
        outer, inner = self.outer, self.inner
        if self.equal:
            length = rows.shape[0] // (outer * inner)
            blocks = rows.reshape(outer, inner, length, *rows.shape[1:])
            return blocks.transpose(0, 1).reshape(rows.shape)
        # Whole blocks move, which concatenation copies at full speed, for any dtype and with its own gradient.
        parts = rows.split(list(self.sizes))
        return torch.cat([parts[o * inner + i] for i in range(inner) for o in range(outer)])

    def back(self) -> _Swap:
        turned = [
            self.sizes[o * self.inner + i] for i in range(self.inner) for o in range(self.outer)
        ]
        return _Swap(self.inner, self.outer, turned, self.equal)


class _Leg(NamedTuple):
    """A flat exchange in a part of the ranks."""

    group: RankGroup
    input_splits: Sequence[int]
    output_splits: Sequence[int]

    def wire(self) -> AllToAll:
        return AllToAll(
            self.input_splits, self.output_splits, self.group, "hierarchical_all_to_all"
        )

    def start(self, rows: Tensor) -> Exchange:
        return Exchange(rows, self.input_splits, self.output_splits, self.group)

    def apply(self, rows: Tensor) -> Tensor:
        return self.start(rows).finish()

    def back(self) -> _Leg:
        return _Leg(self.group, self.output_splits, self.input_splits)


def _steps(splits: Splits, hierarchy: Hierarchy) -> list[_Swap | _Leg]:
    """What this rank does, in order. Comments say by what the blocks are ordered, the slowest first."""
    sends, receives, middle, equal = splits
    local_size, num_nodes = hierarchy.node_size, hierarchy.num_nodes
    size, inside, across = hierarchy.group.size, hierarchy.inside, hierarchy.across
    if hierarchy.form == "2d":
        # middle: source in this node, target node; all of it for this rank's place.
        return [
            _Swap(num_nodes, local_size, sends, equal),  # target's place, target node
            _Leg(inside, _strides(sends, local_size), _runs(middle, num_nodes)),  # middle
            _Swap(local_size, num_nodes, middle, equal),  # target node, source in this node
            _Leg(across, _strides(middle, num_nodes), _runs(receives, local_size)),  # source
        ]
    idle = [0] * (local_size - 1)
    total_sent, total_received = sum(sends), sum(receives)
    if inside.rank != 0:
        # All rows go to the leader, and all come from it.
        nothing = [0, *idle]
        return [
            _Leg(inside, [total_sent, *idle], nothing),
            _Leg(inside, nothing, [total_received, *idle]),
        ]
    # sent: source in this node, target node, target's place. arrived: source node, source's place, target here.
    sent, arrived = middle[: size * local_size], middle[size * local_size :]
    by_node = _runs(sent, local_size)
    return [
        _Leg(inside, [total_sent, *idle], _runs(sent, size)),  # source in this node, target
        _Swap(local_size, num_nodes, by_node, equal),  # target node, source in this node
        _Leg(across, _strides(by_node, num_nodes), _runs(arrived, local_size**2)),  # arrived
        _Swap(size, local_size, arrived, equal),  # target here, source
        _Leg(inside, _strides(arrived, local_size), [total_received, *idle]),  # source
    ]


def _runs(sizes: Sequence[int], length: int) -> list[int]:
    """Sums of ``length`` entries in a row."""
    return [sum(sizes[start : start + length]) for start in range(0, len(sizes), length)]


def _strides(sizes: Sequence[int], step: int) -> list[int]:
    """Sums of every ``step``-th entry."""
    return [sum(sizes[start::step]) for start in range(step)]


def _ask_for_middle(
    rows: Tensor, input_splits: Sequence[int], hierarchy: Hierarchy
) -> Sequence[int]:
    """Send this rank's splits by the same stages, to learn those that pass through it."""
    counts = torch.stack(
        [torch.full((), count, dtype=torch.int64, device=rows.device) for count in input_splits]
    )
    middle = hierarchical_counts(counts, hierarchy)[1].cpu().tolist()
    for count in middle:
        torch._check(count >= 0)
    return middle


def check_hierarchy(op: str, hierarchy: Hierarchy | None, group: RankGroup | None) -> None:
    """A layer's hierarchy is one of its own group."""
    if hierarchy is None:
        return
    if not isinstance(hierarchy, Hierarchy):
        raise TypeError(
            f"{op}: hierarchy must be a Hierarchy or None, got {_checks.describe(hierarchy)}. Pass what "
            "moeops.distributed.build_hierarchy returned."
        )
    _check_form(op, hierarchy.form)
    if hierarchy.group.size > 1 and hierarchy.group != group:
        mine = "one rank" if group is None else describe_group(group)
        raise ValueError(
            f"{op}: hierarchy must arrange the ranks that hold the experts, got {describe_group(hierarchy.group)} and "
            f"{mine}. Build it with the layer's moe_group."
        )


def _check_form(op: str, form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"{op}: form must be one of {FORMS}, got {form!r}. Pick one of them.")


def _sub_groups(op: str, whole: RankGroup, node_size: int) -> tuple[RankGroup, RankGroup]:
    """Make this rank's two groups; the ranks of other groups make theirs at the same time."""
    from torch.distributed import distributed_c10d

    process_group = distributed_c10d._resolve_process_group(whole.name)  # type: ignore[arg-type]  # a str
    members = distributed_c10d.get_process_group_ranks(process_group)
    if members != sorted(members):
        raise ValueError(
            f"{op}: group must order its ranks as the job does, got {members} on rank {whole.rank} of {whole.size}. "
            "Build it with torch.distributed.new_group."
        )
    node, place = divmod(whole.rank, node_size)
    groups = []
    # Inside first on every rank: each call waits for the new group's ranks only.
    for ranks in (members[node * node_size : (node + 1) * node_size], members[place::node_size]):
        made = distributed_c10d.new_group(
            ranks,
            timeout=timeout_of(whole),
            backend=distributed_c10d.get_backend_config(process_group),
            use_local_synchronization=True,
        )
        groups.append(rank_group(made))
    inside, across = groups
    assert inside is not None
    assert across is not None
    return inside, across
