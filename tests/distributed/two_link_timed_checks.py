"""Checks of two links of known speed that work at once, run by every rank of a group: two nodes of two ranks.

Neither links nor experts take time of the CPU: see overlap_checks.py.
"""

from __future__ import annotations

import contextlib
import time
import unittest.mock
from collections.abc import Iterator

import torch
import torch.distributed as dist
from overlap_checks import assert_close
from parallel_cases import TableGate

from moeops import FMoETransformerMLP
from moeops.comm.groups import process_group
from moeops.cost.pipeline import Stage, Task
from moeops.cost.region import NOTHING, RegionPipeline
from moeops.dispatch import region
from moeops.distributed import Exact, Hierarchy, Static, build_hierarchy
from processes import Ranks
from timed_backend import Sent, TimedGroup, start_group

D, TOKENS, K = 64, 24, 4  # every token goes to the one expert of every rank
CALL = 0.01  # seconds of a collective, and of an expert
BETWEEN, INSIDE = 0.12, 0.06  # seconds of all rows that leave a rank one way
WORK = 0.12  # seconds of the experts for all rows of a rank; gradients of rows and of weights take as long each
ROW_BYTES = 4 * D
SAMPLES = 10
DEGREES = ((3, 3), (2, 4))


class Gate(TableGate):
    """Weights without gradients, which would travel beside the rows."""

    def forward(self, x):
        ids, weights = super().forward(x)
        return ids, weights.detach()


def build(kind: type, hierarchy: Hierarchy, n_chunks) -> FMoETransformerMLP:
    options = {"hierarchy": hierarchy, "n_chunks": n_chunks}
    dispatch = Exact(**options) if kind is Exact else Static(capacity=TOKENS, **options)
    layer = FMoETransformerMLP(
        1, D, 8, activation="relu", gate=Gate, top_k=K, dispatch=dispatch, world_size=4,
        moe_group=hierarchy.group,
    )  # fmt: skip
    layer.gate.table = torch.arange(K).repeat(len(layer.gate.table), 1)
    return layer


@contextlib.contextmanager
def sleeping_experts(num_rows: int) -> Iterator[list[Task]]:
    """Experts that take ``WORK`` for so many rows, and as long for either kind of gradients; when they did."""
    slept: list[Task] = []

    def slowly(function, name: str):
        def run(rows, *args, **kwargs):
            start = time.monotonic()
            time.sleep(CALL + WORK * rows.shape[0] / num_rows)
            slept.append(Task("device", name, len(slept), start, time.monotonic()))
            return function(rows, *args, **kwargs)

        return run

    patch = unittest.mock.patch.object
    with (
        patch(torch.ops.moeops, "moe_mlp", slowly(torch.ops.moeops.moe_mlp, "experts")),
        patch(region, "backward_data", slowly(region.backward_data, "experts")),
        patch(region, "backward_weights", slowly(region.backward_weights, "weight_gradients")),
    ):
        yield slept


def links_of(hierarchy: Hierarchy) -> tuple[TimedGroup, TimedGroup]:
    inside, across = (process_group(g.name) for g in (hierarchy.inside, hierarchy.across))
    assert isinstance(inside, TimedGroup)
    assert isinstance(across, TimedGroup)
    return inside, across


class Expected:
    """Rows of each link and of the experts, and what they take.

    Every rank has a quarter of the experts. Exact sends each token to one other node, and inside of one to one other
    rank of those of both nodes; buffers for other ranks are half of all on either link.
    """

    def __init__(self, kind: type) -> None:
        self.between_rows = TOKENS if kind is Exact else 2 * TOKENS
        self.inside_rows = 2 * TOKENS
        self.num_rows = 4 * TOKENS
        # What is sent before the first chunk, of exact: counts and choices, each over both links.
        self.before, self.num_before = 0.0, 0
        if kind is Exact:
            choices = 2 * K * 4 / ROW_BYTES  # of a row
            self.before, self.num_before = 4 * CALL + choices * (BETWEEN + INSIDE), 2
        self.inside_first = kind is Static

    def pipeline(self, backward: bool) -> RegionPipeline:
        inside, work = Stage(CALL, INSIDE), Stage(CALL, WORK)
        weights = work if backward else NOTHING
        between = Stage(CALL, BETWEEN)
        return RegionPipeline(
            between, inside, inside, work, weight_gradients=weights, inside_first=self.inside_first
        )

    def seconds(self, degrees: tuple[int, int]) -> list[float]:
        forward, backward = (
            self.pipeline(way).seconds(n) for way, n in zip((False, True), degrees, strict=True)
        )
        return [self.before + forward, backward]


def measured(layer, links, expected: Expected, close_to: list[float]) -> list[float]:
    """Seconds of forward and backward on the slowest rank, the least of some samples; see ``overlap_checks``."""
    inside, across = links
    x = torch.zeros(TOKENS, D)
    x[:, 0] = torch.arange(TOKENS)
    x.requires_grad_()
    least = torch.full((2,), torch.inf, dtype=torch.float64)
    with sleeping_experts(expected.num_rows):
        for _ in range(SAMPLES):
            dist.barrier()
            inside.set_link(CALL, INSIDE / (expected.inside_rows * ROW_BYTES))
            across.set_link(CALL, BETWEEN / (expected.between_rows * ROW_BYTES))
            begin = time.perf_counter()
            y = layer(x)
            middle = time.perf_counter()
            y.sum().backward()
            sample = [middle - begin, time.perf_counter() - middle]
            slowest = torch.tensor(sample, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            least = torch.minimum(least, slowest)
            if bool((least < 1.05 * torch.tensor(close_to)).all()):
                break
    return least.tolist()


def check_two_links_take_the_time_of_the_pipeline(ranks: Ranks) -> None:
    """Both links and experts at once: less than one link after the other would take, and as long as predicted."""
    hierarchy = build_hierarchy(start_group(), 2)
    links = links_of(hierarchy)
    for kind in (Static, Exact):
        expected = Expected(kind)
        for degrees in DEGREES:
            layer = build(kind, hierarchy, degrees)
            seconds = expected.seconds(degrees)
            got = measured(layer, links, expected, seconds)
            assert_close(got, seconds, f"{kind.__name__}, {degrees}")
            in_turns = [expected.before + 2 * (BETWEEN + INSIDE + 2 * n * CALL) for n in degrees]
            # Longer than links in turns alone would be what nothing is gained by.
            alone = [
                turns + work + (1 + way) * n * CALL
                for way, (turns, n, work) in enumerate(
                    zip(in_turns, degrees, (WORK, 2 * WORK), strict=True)
                )
            ]
            assert all(one < 0.85 * other for one, other in zip(got, alone, strict=True)), (
                got,
                alone,
            )
            chunks = [link.sent[expected.num_before :] for link in links]
            overlaps = [(a, b) for a in chunks[0] for b in chunks[1] if overlap(a, b) > CALL / 2]
            assert len(overlaps) > 2 * min(degrees), overlaps
    for link in links:
        link.set_link()


def overlap(one: Sent, other: Sent) -> float:
    """Seconds for which both were on their ways."""
    return min(one.ended, other.ended) - max(one.started, other.started)
