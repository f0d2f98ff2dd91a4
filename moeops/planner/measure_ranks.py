"""Times of ranks together: exchanges, reductions, what is lost when experts run beside them, and the host's part.

W ranks, L ranks per node. Every rank calls everything here, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moeops.dispatch.base import DispatchOptions
from moeops.dispatch.gather import Gather
from moeops.dispatch.options import Exact, Static
from moeops.gates.naive import NaiveGate
from moeops.layers.transformer import FMoETransformerMLP
from moeops.planner.measure import Sizes
from moeops.profiling.clock import Clock
from moeops.profiling.links import all_reduces, all_to_alls, gathers, overlap
from moeops.profiling.work import ExpertRun, Record, random_weights

MESSAGES = (1, 4, 16)  # small ones, to one other rank
MESSAGE_BYTES = 4096
CHUNKS = (1, 2, 4)
COMPILED_CHUNKS = (1, 2)  # each is a compilation
# A layer so small that devices wait for hosts.
TINY_TOKENS, TINY_WIDTH, TINY_EXPERTS = 32, 64, 2


def measure_links(clock: Clock, sizes: Sizes, node_size: int) -> dict[str, list[Record]]:
    """All-to-alls in groups of 2, 4, ... ranks of a node, those of one local rank on all nodes, and all-reduces.

    Messages cost something beside their bytes. In groups of few ranks that does not show, so several small messages
    to one rank are timed too: they cost at least as much as messages to different ranks.
    """
    size = clock.ranks.size
    found: dict[str, list[Record]] = {}
    if node_size > 1:
        found["inside_node"] = []
        length = 2
        lengths = {node_size}
        while length < node_size:
            if node_size % length == 0:
                lengths.add(length)
            length *= 2
        for length in sorted(lengths):
            group = _own_group([list(range(s, s + length)) for s in range(0, size, length)])
            found["inside_node"] += all_to_alls(clock, sizes.exchange, group, length)
        first = clock.ranks.rank // node_size * node_size
        local = clock.ranks.rank - first
        target, source = ((local + step) % node_size + first for step in (1, -1))
        found["inside_node"] += _messages(clock, target, source)
        found["all_reduce"] = all_reduces(clock, sizes.exchange, group, node_size)
        found |= gathers(clock, sizes.exchange, group, node_size)
    if node_size < size:
        group = _own_group([list(range(s, size, node_size)) for s in range(node_size)])
        found["between_nodes"] = all_to_alls(clock, sizes.exchange, group, size // node_size)
        target, source = ((clock.ranks.rank + step * node_size) % size for step in (1, -1))
        found["between_nodes"] += _messages(clock, target, source)
    return found


def _own_group(groups: list[list[int]]) -> Any:
    """This rank's one of several groups; every rank makes all of them."""
    own = None
    for members in groups:
        group = (
            dist.group.WORLD if len(members) == dist.get_world_size() else dist.new_group(members)
        )
        if dist.get_rank() in members:
            own = group
    return own


def _messages(clock: Clock, target: int, source: int) -> list[Record]:
    """Several small messages to one rank, as one call."""
    records = []
    for count in MESSAGES:
        buffers = torch.zeros(2, count, MESSAGE_BYTES, dtype=torch.uint8, device=clock.device)

        def call(buffers=buffers, count=count) -> None:
            sends = [dist.P2POp(dist.isend, buffers[0, i], target) for i in range(count)]
            receives = [dist.P2POp(dist.irecv, buffers[1, i], source) for i in range(count)]
            for work in dist.batch_isend_irecv(sends + receives):
                work.wait()

        records.append(
            {
                "op": "batch_isend_irecv",
                "ranks": 2,
                "num_messages": count,
                "num_bytes": count * MESSAGE_BYTES,
                "seconds": clock.seconds(call, together=True),
            }
        )
    return records


def measure_overlap(clock: Clock, sizes: Sizes, dtype: torch.dtype) -> list[Record]:
    """Experts alone, an exchange alone, and both at once."""
    records = []
    for d_model, d_hidden, num_experts, rows, num_bytes in sizes.overlap:
        weights = random_weights(clock, d_model, d_hidden, num_experts, "swiglu", dtype)
        block = ExpertRun(clock, weights, rows)
        records.append(overlap(clock, block, num_bytes, dist.group.WORLD))
    return records


def measure_host(clock: Clock, dtype: torch.dtype, *, compiled: bool) -> list[Record]:
    """Host seconds of tiny layers by dispatcher and number of chunks: gate, first expert, forward, backward."""
    dispatchers: dict[str, Callable[..., DispatchOptions]] = {"local": Exact}
    if clock.ranks.size > 1:
        dispatchers |= {"exact": Exact, "gather": Gather, "static": partial(Static, 1.25)}
    in_chunks = ("exact", "static")
    records: list[Record] = []
    for dispatcher, options in dispatchers.items():
        world_size = 1 if dispatcher == "local" else clock.ranks.size
        shares: dict[int, tuple[float, float]] = {}
        for n_chunks in CHUNKS if dispatcher in in_chunks else (1,):
            record = options(n_chunks=n_chunks) if dispatcher in in_chunks else options()
            layer = _tiny_layer(clock, dtype, world_size, record)
            values = clock.host_samples(_marked_call(layer, clock, dtype))
            names = ("router", "first", "forward", "backward")
            facts = {"dispatcher": dispatcher, "n_chunks": n_chunks}
            records.append({"mode": "eager", **facts, **dict(zip(names, values, strict=True))})
            whole = values[0] + values[2]
            shares[n_chunks] = values[0] / whole, values[1] / whole
        if not compiled:
            continue
        for n_chunks in COMPILED_CHUNKS if dispatcher in in_chunks else (1,):
            torch._dynamo.reset()
            record = options(n_chunks=n_chunks) if dispatcher in in_chunks else options()
            layer = _tiny_layer(clock, dtype, world_size, record)
            forward, backward = clock.host_samples(_compiled_call(layer, clock, dtype))
            # No clock runs inside a graph: the parts are shared as in eager mode.
            router, first = (share * forward for share in shares[n_chunks])
            records.append(
                {
                    "mode": "compiled",
                    "dispatcher": dispatcher,
                    "n_chunks": n_chunks,
                    "router": router,
                    "first": first,
                    "forward": forward - router,
                    "backward": backward,
                }
            )
    return records


def _tiny_layer(
    clock: Clock, dtype: torch.dtype, world_size: int, dispatch: DispatchOptions
) -> FMoETransformerMLP:
    return FMoETransformerMLP(
        TINY_EXPERTS, TINY_WIDTH, TINY_WIDTH, "swiglu", bias=False, top_k=2, gate=NaiveGate,
        world_size=world_size, dispatch=dispatch, dtype=dtype, device=clock.device,
    )  # fmt: skip


def _tiny_tokens(clock: Clock, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(TINY_TOKENS, TINY_WIDTH, device=clock.device).to(dtype)
    return x.requires_grad_()


def _marked_call(
    layer: FMoETransformerMLP, clock: Clock, dtype: torch.dtype
) -> Callable[[], list[float]]:
    """A step that returns seconds: of the gate, from there to the first expert and to the end, of the backward."""
    marks: list[float] = []
    layer.gate.register_forward_hook(lambda *_: marks.append(time.perf_counter()))
    layer.experts.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
    x = _tiny_tokens(clock, dtype)

    def call() -> list[float]:
        marks[:] = [time.perf_counter()]
        y = layer(x)
        end = time.perf_counter()
        backward = _backward_seconds(y, layer)
        begin, gate, first, *_ = marks
        return [gate - begin, first - gate, end - gate, backward]

    return call


def _compiled_call(
    layer: FMoETransformerMLP, clock: Clock, dtype: torch.dtype
) -> Callable[[], list[float]]:
    """A step that returns the seconds of the forward and of the backward."""
    compiled = torch.compile(layer, fullgraph=True)
    x = _tiny_tokens(clock, dtype)

    def call() -> list[float]:
        begin = time.perf_counter()
        y = compiled(x)
        end = time.perf_counter()
        return [end - begin, _backward_seconds(y, layer)]

    return call


def _backward_seconds(y: torch.Tensor, layer: Any) -> float:
    grad = torch.ones_like(y)
    begin = time.perf_counter()
    y.backward(grad)
    seconds = time.perf_counter() - begin
    layer.zero_grad()
    return seconds
