"""The region of a layer whose tokens go to each node once. T tokens, K experts each, W ranks on M nodes of L ranks.

All that the ranks must know is exchanged before the first chunk: how many rows go where, copied to the host once, and
what the gate chose for the tokens that pass through a rank or arrive at it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _nests
from moeops.comm.exchange import exchange_counts, exchange_detached
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy
from moeops.dispatch.counts import check_signatures, copy_to_host, count_cells, row_signature
from moeops.dispatch.degrees import Degrees
from moeops.dispatch.forms import own_ids, owners_of, pack_choices, unpack_choices
from moeops.dispatch.region import Region
from moeops.dispatch.transports import sort_by_target
from moeops.types import Routing


class Layout(NamedTuple):
    """Where experts are, and how their work is cut.

    Attributes:
        group: the ranks.
        hierarchy: how they are arranged as nodes.
        num_expert: ``E_local``.
        degrees: chunks in each direction.
        points: where cells of these begin: ``cut_fractions``, which compilers cannot compute.
    """

    group: RankGroup
    hierarchy: Hierarchy
    num_expert: int
    degrees: Degrees
    points: list[tuple[int, int]]


class _Counts(NamedTuple):
    """How many tokens travel: tables on the device and, with ``numbers``, on the host.

    Attributes:
        from_nodes: to this rank from each node in each cell, ``[M, cells]``.
        arriving: to its experts in each cell, ``[W, cells]``, by place in the node and then by node.
        numbers: lists of ``[M, cells]`` to nodes, ``[M, cells]`` from nodes, ``[L, cells]`` to ranks inside,
            ``[L, cells]`` from ranks inside, ``[cells]`` pairs of this rank's experts.
    """

    from_nodes: Tensor
    arriving: Tensor
    numbers: list[list[int]]


def region_by_node(layout: Layout, routing: Routing, inp: Any) -> Region:
    """Exchange counts and choices of all chunks of both directions, and leave the rest to the region.

    Host sync: one copy.
    """
    hierarchy, num_cells = layout.hierarchy, len(layout.points) - 1
    node_experts = layout.num_expert * hierarchy.node_size
    _, nodes = owners_of(routing.topk_ids, node_experts)  # [T, K], each once
    counts = _exchange_counts(layout, routing, nodes, inp)
    sends, passing, onward, receives = (
        [sum(table[i : i + num_cells]) for i in range(0, len(table), num_cells)]
        for table in counts.numbers[:4]
    )
    op, permute = "ExactDispatcher", torch.ops.moeops.permute_tokens
    packed = pack_choices(routing.topk_ids, routing.topk_weights.detach())  # [T, 2 K]
    plan = sort_by_target(nodes, hierarchy.num_nodes, sum(sends))
    packed = exchange_detached(op, permute(packed, *plan), sends, passing, hierarchy.across)
    ids, _ = unpack_choices(packed)
    _, places = owners_of(own_ids(ids, hierarchy.across.rank, node_experts), layout.num_expert)
    plan = sort_by_target(places, hierarchy.node_size, sum(onward))
    packed = exchange_detached(op, permute(packed, *plan), onward, receives, hierarchy.inside)
    ids, weights = unpack_choices(packed)
    tables = [nodes, counts.from_nodes, places, counts.arriving, ids, weights]
    sizes: list[int] = [*layout.degrees]
    for table in counts.numbers:
        sizes += [number for cell in range(num_cells) for number in table[cell::num_cells]]
    return Region(
        "nodes", tables, sizes, layout.group, layout.num_expert, layout.degrees, hierarchy
    )


def _exchange_counts(layout: Layout, routing: Routing, nodes: Tensor, inp: Any) -> _Counts:
    """Tell each node what comes, and each rank of it what goes on to there."""
    hierarchy, size, points = layout.hierarchy, layout.group.size, layout.points
    num_places, num_nodes = hierarchy.node_size, hierarchy.num_nodes
    num_cells = len(points) - 1
    owners, firsts = owners_of(routing.topk_ids, layout.num_expert)
    by_rank = torch.stack([count_cells(each, size, points) for each in (firsts, owners)], 2)
    to_nodes = count_cells(nodes, num_nodes, points)  # [M, cells]
    # Size and type of a row go with the counts, so that ranks that disagree all see it.
    leaves = _nests.leaves(inp)
    signature = [torch.full_like(to_nodes[:, :1], mark) for mark in row_signature(leaves)]
    told = exchange_counts(
        torch.cat((by_rank.reshape(num_nodes, -1), to_nodes, *signature), 1), hierarchy.across
    )
    from_nodes, marks = told[:, -2 - num_cells : -2].contiguous(), told[:, -2:]
    through = told[:, : -2 - num_cells].view(num_nodes, num_places, num_cells, 2)
    onward = through.transpose(0, 1)  # [L, M, cells, 2]
    marks = marks.flatten().expand(num_places, -1)
    told = exchange_counts(torch.cat((onward.flatten(1), marks), 1), hierarchy.inside)
    arrived = told[:, : -2 * num_nodes].view(num_places, num_nodes, num_cells, 2)
    marks = told[:, -2 * num_nodes :].view(num_places, num_nodes, 2).transpose(0, 1)
    *numbers, signatures = copy_to_host(
        [
            to_nodes,
            from_nodes,
            onward[..., 0].sum(1),
            arrived[..., 0].sum(1),
            arrived[..., 1].sum((0, 1)),
            marks,
        ]
    )
    check_signatures(layout.group, leaves, signatures)
    return _Counts(from_nodes, arrived[..., 0].flatten(0, 1).contiguous(), numbers)
