"""Compiled regions work in the chunks that ranks agreed on when the layers were built, or in others for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from moeops.comm.groups import process_group
from moeops.compile.passes import BEFORE_AUTOGRAD, Pass
from moeops.compile.walk import named_dispatchers
from moeops.dispatch.degrees import Degrees, cut_points
from moeops.dispatch.transports import TRANSPORTS

_EP_REGION = torch.ops.moeops.ep_region
_TARGETS = (_EP_REGION, _EP_REGION.default)
# Waiting is a side effect to torch, but not where nothing is begun.
_WAITS = (torch.ops._c10d_functional.wait_tensor, torch.ops._c10d_functional.wait_tensor.default)
_NAMES = [argument.name for argument in _EP_REGION.default._schema.arguments]


class SetDegrees(Pass):
    """Set the chunks of every ``moeops::ep_region``.

    Before::

        y = moeops.ep_region(x, ..., r_fwd=2, r_bwd=2)

    After, with ``degrees=(4, 3)``::

        y = moeops.ep_region(x, ..., r_fwd=4, r_bwd=3)

    Degrees do not change what a region computes, but for the order in which gradients of weights are summed. Where
    tokens are gathered, chunks that were begun before the gate are dropped if there are to be others: the region begins
    its own. Where rows are sent by exact counts, there are counts between the cut points of the layer's own degrees
    only, and a degree that cuts elsewhere is an error.

    Without ``degrees`` nothing is rewritten: a region whose degrees no layer of the model has is an error. So is, with
    and without, a region whose group this process does not have.

    Args:
        agreed: degrees of the model's layers.
        degrees: what to set; ``None`` for what the layers have.
    """

    hook = BEFORE_AUTOGRAD

    def __init__(self, agreed: tuple[Degrees, ...], degrees: Degrees | None = None) -> None:
        self.agreed = agreed
        self.degrees = degrees

    @classmethod
    def of_model(cls, model: nn.Module) -> SetDegrees:
        """Read the degrees of the model's layers, on which their ranks have agreed."""
        found = {dispatcher.degrees for _, dispatcher in named_dispatchers(model)}
        return cls(tuple(sorted(found)))

    def settings(self) -> tuple[Any, ...]:
        """The degrees."""
        return tuple(tuple(pair) for pair in self.agreed), self.degrees and tuple(self.degrees)

    def rewrite(self, graph: Graph) -> int:
        """Set degrees; return how many regions had others."""
        num_sites = 0
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in _TARGETS:
                continue
            _check_group(node)
            own = Degrees(_argument(node, "r_fwd"), _argument(node, "r_bwd"))
            if self.degrees is None and own not in self.agreed:
                raise RuntimeError(
                    f"SetDegrees: a region must work in chunks of the model's layers, {_text(self.agreed)}, got {own}. "
                    "Call moeops.compile.options with the model that is compiled, after its layers are built."
                )
            if self.degrees is not None and own != self.degrees:
                _set_degrees(graph, node, self.degrees)
                num_sites += 1
        return num_sites


def _set_degrees(graph: Graph, node: Node, degrees: Degrees) -> None:
    transport, tables = _argument(node, "transport"), _argument(node, "tables")
    if transport in ("exact", "nodes"):
        _check_cells(node, degrees)
    num_tables = TRANSPORTS[transport].num_tables
    begun = tables[num_tables:]
    if len(begun) != degrees.forward:
        _set_argument(node, "tables", list(tables[:num_tables]))
        for sent in begun:
            if not sent.users:
                _erase(graph, sent)
    _set_argument(node, "r_fwd", degrees.forward)
    _set_argument(node, "r_bwd", degrees.backward)


def _erase(graph: Graph, node: Node) -> None:
    """Drop what was begun and nobody reads, and what was done for it alone: a chunk may have passed a link before."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for one in inputs:
        if not one.users and (one.target in _WAITS or not one.is_impure()):
            _erase(graph, one)


def _check_cells(node: Node, degrees: Degrees) -> None:
    counted = _argument(node, "sizes")[:2]
    missing = set(cut_points(degrees)) - set(cut_points(counted))
    if missing:
        raise ValueError(
            f"SetDegrees: degrees must cut where the counts of dispatch='exact' do, in {Degrees(*counted)} chunks, got "
            f"{degrees}. Build the layer with n_chunks={tuple(degrees)}."
        )


def _check_group(node: Node) -> None:
    names = [_argument(node, "group_name")]
    if _argument(node, "node_size"):
        names += [_argument(node, "inside_name"), _argument(node, "across_name")]
    for name in names:
        try:
            process_group(name)
        except (RuntimeError, ValueError) as err:
            raise RuntimeError(
                f"SetDegrees: a region must belong to a process group of this process, got {name!r}: {err}. Make the "
                "groups, in the same order on every rank, before the model is compiled."
            ) from err


def _text(agreed: tuple[Degrees, ...]) -> str:
    return ", ".join(str(pair) for pair in agreed) or "of which it has none"


def _argument(node: Node, name: str) -> Any:
    position = _NAMES.index(name)
    return node.args[position] if position < len(node.args) else node.kwargs[name]


def _set_argument(node: Node, name: str, value: Any) -> None:
    position = _NAMES.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
