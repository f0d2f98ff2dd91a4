"""Every rank runs the same collectives in the same order, or all of them raise before the first one. W ranks.

A collective begins when all ranks of its group have begun it. Ranks whose graphs hold the same collectives in another
order wait for each other until the time-out, or mix up what they receive. Each rank compiles for itself, so nothing but
equal sources and equal decisions makes the orders equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from moeops.comm.peer import PEER_OPS
from moeops.compile.passes import LAST, Pass, set_value


class Order(Pass):
    """Let ranks compare the order of collectives in a graph, before its first run on each of them.

    Before::

        sent = _c10d_functional.all_to_all_single(x, ..., "0")

    After::

        mark = aten.empty([1], dtype=uint8)
        moeops.check_order_(mark, ["0"], ["all_to_all_single of float32 in group 1"])
        sent = _c10d_functional.all_to_all_single(x, ..., "0")

    The op is the first of the graph. It compares by the job's store, once for each order and group, and costs a look
    into a table from then on. What it compares is part of the generated code, so that a rank which finds this in its
    cache compares as well. Compared are ops, types, kinds of sums and which of the graph's groups take part, not sizes,
    which may differ between ranks. Nothing else is moved or changed. Sends from one rank to another are not compared.
    """

    hook = LAST

    def rewrite(self, graph: Graph) -> int:
        """Insert the op into a graph with collectives; return 1 for it, 0 for a graph without."""
        collectives = [node for node in graph.nodes if is_collective(node)]
        if not collectives:
            return 0
        groups: list[str] = []
        for node in collectives:
            if group_of(node) not in groups:
                groups.append(group_of(node))
        order = [_describe(node, groups) for node in collectives]
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            mark = graph.call_function(
                torch.ops.aten.empty.memory_format,
                ([1],),
                {"dtype": torch.uint8, "device": torch.device("cpu"), "pin_memory": False},
            )
            check = graph.call_function(
                torch.ops.moeops.check_order_.default, (mark, groups, order)
            )
        set_value(mark, collectives[0], lambda: torch.empty(1, dtype=torch.uint8))
        check.meta["val"] = None
        return 1


_SENDS = ("isend", "irecv", "batch_p2p_ops")


def is_collective(node: Node) -> bool:
    """A node begins a collective of torch's, or an exchange by peer memory."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and (target.namespace == "_c10d_functional" or target in PEER_OPS)
        and _position(target, "group_name") is not None
        and target._opname not in _SENDS
    )


def group_of(node: Node) -> str:
    """Name of the group of a collective."""
    name = _argument(node, "group_name")
    return name if isinstance(name, str) else name.group_name


def _describe(node: Node, groups: list[str]) -> str:
    """A collective in words that are the same on every rank; groups count from 1 as the graph first has them."""
    target: Any = node.target
    inputs: Any = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:1]
    dtypes = [str(one.meta["val"].dtype).removeprefix("torch.") for one in inputs]
    text = f"{target._opname} of {', '.join(dtypes)} in group {groups.index(group_of(node)) + 1}"
    if _position(target, "reduce_op") is not None:
        text += f" by {_argument(node, 'reduce_op')}"
    return text


def _position(target: torch._ops.OpOverload, name: str) -> int | None:
    names = [argument.name for argument in target._schema.arguments]
    return names.index(name) if name in names else None


def _argument(node: Node, name: str) -> Any:
    target: Any = node.target
    position = _position(target, name)
    assert position is not None
    return node.args[position] if position < len(node.args) else node.kwargs[name]
