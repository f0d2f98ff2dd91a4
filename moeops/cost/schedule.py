"""Stages of an expert-parallel layer, and the chunks that a cost model chooses. T tokens, K experts each, W ranks.

A layer is FSMoE's pipeline as a region runs it, with one lane of links, an exchange there, experts and an exchange
back; or, where its ranks are arranged as nodes, with two of them. Only the standard library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from moeops.cost.laws import ITEM_BYTES, distinct_parts
from moeops.cost.model import CostModel
from moeops.cost.pipeline import Stage
from moeops.cost.region import NOTHING, RegionPipeline

DEGREES = range(1, 9)
# Degrees above 1 must save more than this part of the time: predictions are not better.
WORTH = 0.01
_ID_AND_WEIGHT = 8  # bytes
_WEIGHT = 4
# Of the experts' backward, what their weights' gradients take: as many products as gradients of rows.
WEIGHTS_SHARE = 0.5


class MlpSizes(NamedTuple):
    """Sizes of experts that are MLPs.

    Attributes:
        d_model: ``D``.
        d_hidden: ``H`` of a rank's share of an expert.
        num_projections: 3 for swiglu, 2 otherwise.
        dtype: name of a float type.
    """

    d_model: int
    d_hidden: int
    num_projections: int
    dtype: str


@dataclass(frozen=True)
class LayerSizes:
    """A layer on several ranks.

    Attributes:
        dispatcher: "exact", "gather" or "static".
        mlps: its experts.
        num_tokens: ``T`` of a rank.
        top_k: ``K``.
        world_size: ``W``.
        num_expert: ``E_local``.
        capacity: rows of each expert for each rank, for "static".
        node_size: ``L``, where rows go to nodes and on inside of them; 0 for the flat exchange.
    """

    dispatcher: str
    mlps: MlpSizes
    num_tokens: int
    top_k: int
    world_size: int
    num_expert: int
    capacity: int = 0
    node_size: int = 0

    @property
    def rows(self) -> float:
        """Rows of a rank's experts, with balanced loads."""
        if self.dispatcher == "static":
            return float(self.world_size * self.num_expert * self.capacity)
        return float(self.num_tokens * self.top_k)

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.mlps.d_model * ITEM_BYTES[self.mlps.dtype]


class Degree(NamedTuple):
    """A number of chunks in each direction, and the seconds that both take together."""

    forward: int
    backward: int
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """What a cost model says of a layer.

    Attributes:
        sizes: of the layer.
        forward: its stages; ``all_to_all`` is the mean of the exchanges there and back, and ``all_gather`` and
            ``reduce_scatter`` are what they are inside a node.
        backward: the same of the backward alone.
        overlap_loss: see ``CostModel``.
        recut_seconds: what the backward pays for chunks of its own: rows and pre-activations are copied.
        sum_seconds: what it pays for each chunk more than one: the weights' gradients are added up.
        model: that has priced it.
    """

    sizes: LayerSizes
    forward: RegionPipeline
    backward: RegionPipeline
    overlap_loss: float
    recut_seconds: float
    sum_seconds: float
    model: CostModel = field(repr=False, compare=False)

    def forward_seconds(self, degree: int) -> float:
        """Seconds from the first exchange to the last, overlap loss included."""
        return self._with_loss(self.forward, degree)

    def backward_seconds(self, degree: int, forward_degree: int) -> float:
        """The same of the backward, behind a forward of some degree."""
        pipeline = self.backward_pipeline(degree, forward_degree)
        seconds = self._with_loss(pipeline, degree) + (degree - 1) * self.sum_seconds
        return seconds + (self.recut_seconds if degree != forward_degree else 0.0)

    def backward_pipeline(self, degree: int, forward_degree: int) -> RegionPipeline:
        """The backward's stages; tokens gathered in one chunk are no region, and answers wait for all gradients."""
        one = degree == forward_degree == 1 and self.sizes.dispatcher == "gather"
        return self.backward.undivided() if one else self.backward

    def best(self, degrees: Iterable[int] = DEGREES) -> Degree:
        """The fewest chunks within ``WORTH`` of the fastest pair, by trying all pairs."""
        degrees = list(degrees)
        pairs = [
            Degree(f, b, self.forward_seconds(f) + self.backward_seconds(b, f))
            for f in degrees
            for b in degrees
        ]
        limit = (1 + WORTH) * min(pair.seconds for pair in pairs)
        near = (pair for pair in pairs if pair.seconds <= limit)
        return min(near, key=lambda pair: (pair.forward + pair.backward, pair.seconds))

    def _with_loss(self, pipeline: RegionPipeline, degree: int) -> float:
        span = pipeline.seconds(degree)
        return span + self.overlap_loss * (pipeline.busy_seconds(degree) - span)


def schedule_of(sizes: LayerSizes, model: CostModel) -> Schedule:
    """Price a layer's stages.

    Raises:
        ValueError: a size does not fit, or the model lacks a law that this layer needs.
    """
    item = ITEM_BYTES[sizes.mlps.dtype]
    pre_width = (sizes.mlps.num_projections - 1) * sizes.mlps.d_hidden
    kept = sizes.rows * pre_width * item + sizes.num_tokens * sizes.row_bytes
    weights = sizes.num_expert * sizes.mlps.num_projections
    weights *= sizes.mlps.d_model * sizes.mlps.d_hidden * item
    forward, backward = (_pipeline(sizes, model, way) for way in (False, True))
    return Schedule(
        sizes,
        forward,
        backward,
        model.overlap_loss or 0.0,
        model.memory_seconds(4 * kept),  # joined, then cut
        model.memory_seconds(3 * weights),
        model,
    )


def _pipeline(sizes: LayerSizes, model: CostModel, backward: bool) -> RegionPipeline:
    experts, weights = _experts(sizes, model, backward), NOTHING
    if backward:
        experts, weights = (experts.repeated(n) for n in (1 - WEIGHTS_SHARE, WEIGHTS_SHARE))
    if sizes.node_size:
        between, inside = _links(sizes, model, backward)
        first = sizes.dispatcher == "static"
        return RegionPipeline(between, inside, inside, experts, 0.0, weights, inside_first=first)
    exchange = _exchange(sizes, model, backward)
    return RegionPipeline(exchange, NOTHING, NOTHING, experts, 0.0, weights)


def _links(sizes: LayerSizes, model: CostModel, backward: bool) -> tuple[Stage, Stage]:
    """An exchange between nodes, and one inside of them with the copy between both: the mean of both ways."""
    local, size = sizes.node_size, sizes.world_size
    nodes = size // local
    if sizes.dispatcher == "static":
        num_bytes = sizes.num_expert * size * sizes.capacity * sizes.row_bytes
        sent, calls = (num_bytes, num_bytes), 1.0
    else:
        # Gradients of weights come back beside rows, in collectives of their own.
        token_bytes = sizes.row_bytes + sizes.top_k * _WEIGHT * backward / 2
        num_experts = size * sizes.num_expert
        sent = tuple(  # type: ignore[assignment]  # two
            sizes.num_tokens * distinct_parts(parts, num_experts, sizes.top_k) * token_bytes
            for parts in (nodes, size)
        )
        calls = 1.5 if backward else 1.0
    far, near = (
        _stage(lambda n, law=law, peers=peers: law.seconds(n * peers / (peers + 1), peers), each)  # type: ignore[misc]  # own values
        for law, peers, each in (
            (model.link("between_nodes"), nodes - 1, sent[0]),
            (model.link("inside_node"), local - 1, sent[1]),
        )
    )
    copy = _stage(model.memory_seconds, sum(sent))
    far, near = (Stage(calls * each.call_seconds, each.work_seconds) for each in (far, near))
    inside = Stage(near.call_seconds + copy.call_seconds, near.work_seconds + copy.work_seconds)
    return far, inside


def _experts(sizes: LayerSizes, model: CostModel, backward: bool) -> Stage:
    def seconds(rows: float) -> float:
        mlps = sizes.mlps
        return model.expert_seconds(
            rows,
            mlps.d_model,
            mlps.d_hidden,
            mlps.num_projections,
            mlps.dtype,
            backward,
            num_experts=sizes.num_expert,
        )

    return _stage(seconds, sizes.rows)


def _exchange(sizes: LayerSizes, model: CostModel, backward: bool) -> Stage:
    """The mean of both ways."""
    size = sizes.world_size
    if sizes.dispatcher == "static":
        num_bytes = sizes.num_expert * size * sizes.capacity * sizes.row_bytes
        return _stage(lambda n: model.all_to_all_seconds(n, size), num_bytes)
    beside = sizes.top_k * _WEIGHT
    if sizes.dispatcher == "gather":
        # The choices of all tokens are gathered at once; gradients of weights come back chunk by chunk.
        gather, scatter = (
            _stage(lambda n, way=way: model.gather_seconds(n, size)[way], sizes.num_tokens * row)  # type: ignore[misc]  # way
            for way, row in ((0, sizes.row_bytes), (1, sizes.row_bytes + beside * backward))
        )
        calls = gather.call_seconds + (1 + backward) * scatter.call_seconds
        return Stage(calls / 2, (gather.work_seconds + scatter.work_seconds) / 2)
    if not backward:
        beside = sizes.top_k * _ID_AND_WEIGHT
    sent = sizes.num_tokens * distinct_parts(size, size * sizes.num_expert, sizes.top_k)
    stage = _stage(
        lambda n: model.all_to_all_seconds(n, size), sent * (sizes.row_bytes + beside / 2)
    )
    # Three exchanges for both ways: rows there and back, and one of what is beside them.
    return Stage(1.5 * stage.call_seconds, stage.work_seconds)


def _stage(seconds: Callable[[float], float], work: float) -> Stage:
    """A stage by what it costs with nothing to do, and with all there is."""
    call = seconds(0.0)
    return Stage(call, max(seconds(work) - call, 0.0))
