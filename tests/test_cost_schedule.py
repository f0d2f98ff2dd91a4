"""Chunks that a cost model chooses for a layer, and what it says of them."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from torch import nn

from moeops import FMoETransformerMLP
from moeops.comm import RankGroup
from moeops.compile import explain
from moeops.compile.explain import text_timeline
from moeops.cost.laws import LinkLaw
from moeops.cost.model import CostModel
from moeops.cost.pipeline import Pipeline, Stage
from moeops.cost.region import NOTHING, RegionPipeline
from moeops.cost.schedule import DEGREES, WORTH, LayerSizes, MlpSizes, schedule_of
from moeops.dispatch import AutoChunks, Exact, ExpertRanks, Gather, Static
from moeops.dispatch.options import build_dispatcher, choose_degrees

RATES = {"products_per_second": 1e12, "link_bytes_per_second": 1e10, "message_seconds": 1e-5}
MODEL = CostModel.from_rates(**RATES, memory_bytes_per_second=1e12, dtypes=("float32",))
MLPS = MlpSizes(64, 256, 3, "float32")
SIZES = LayerSizes("gather", MLPS, 4096, 2, 2, 4)


def test_stages_are_those_of_the_laws():
    schedule = schedule_of(SIZES, MODEL)
    token_bytes, pairs = 4096 * 64 * 4, 4096 * 2
    # A message to the other rank for each collective: an all-gather there, and a reduce-scatter back.
    assert schedule.forward.all_to_all.call_seconds == pytest.approx(1e-5)
    assert schedule.forward.all_to_all.work_seconds == pytest.approx(token_bytes / 1e10)
    # Gradients of weights come back as well, in a collective of their own.
    assert schedule.backward.all_to_all.call_seconds == pytest.approx(1.5e-5)
    assert schedule.backward.all_to_all.work_seconds == pytest.approx(
        (token_bytes + pairs * 2) / 1e10
    )
    moved = pairs * 2 * (2 * 64 + 3 * 256) * 4 / 1e12
    for pipeline, factor in ((schedule.forward, 1), (schedule.backward, 2)):
        products = pairs * 3 * 64 * 256 / 1e12
        # Gradients of weights, half of the backward, are not what answers wait for.
        assert pipeline.experts.work_seconds == pytest.approx(products + moved)
        assert pipeline.weight_gradients.work_seconds == pytest.approx(
            (factor - 1) * (products + moved)
        )
    static = schedule_of(dataclasses.replace(SIZES, dispatcher="static", capacity=1000), MODEL)
    # Half of the buffers stay here.
    assert static.forward.all_to_all.work_seconds == pytest.approx(4 * 1000 * 64 * 4 / 1e10)
    exact = schedule_of(dataclasses.replace(SIZES, dispatcher="exact"), MODEL)
    reached = 2 * (1 - (4 * 3) / (8 * 7))  # ranks that have one of two experts of eight
    row = 64 * 4 + 2 * 8 / 2  # ids and weights travel one way
    assert exact.forward.all_to_all.work_seconds == pytest.approx(4096 * reached * row / 2 / 1e10)


def test_the_best_pair_is_the_first_that_is_near_the_fastest():
    schedule = schedule_of(SIZES, MODEL)
    seconds = {
        pair: schedule.forward_seconds(pair[0]) + schedule.backward_seconds(pair[1], pair[0])
        for pair in itertools.product(DEGREES, repeat=2)
    }
    best = schedule.best()
    assert best.seconds == seconds[best[:2]] <= (1 + WORTH) * min(seconds.values())
    fewer = [pair for pair in seconds if sum(pair) < sum(best[:2])]
    assert all(seconds[pair] > (1 + WORTH) * min(seconds.values()) for pair in fewer)
    assert best.forward > 1
    assert best.seconds < seconds[1, 1]


def test_one_chunk_where_nothing_is_hidden():
    """An exchange that takes from the experts what it hides, and calls that cost more than they save."""
    for model in (
        dataclasses.replace(MODEL, overlap_loss=1.0),
        CostModel.from_rates(
            **{**RATES, "message_seconds": 1.0}, memory_bytes_per_second=1e12, dtypes=("float32",)
        ),
    ):
        assert schedule_of(SIZES, model).best()[:2] == (1, 1)


NODES = dataclasses.replace(
    MODEL, inside_node=LinkLaw(2e-6, 0.0, 1e-11), between_nodes=LinkLaw(1e-5, 3e-6, 1e-10)
)
ON_NODES = dataclasses.replace(SIZES, dispatcher="exact", world_size=8, num_expert=2, node_size=4)


def test_stages_of_two_links_are_those_of_both_laws():
    """8 ranks on 2 nodes, 16 experts, two for each token."""
    schedule = schedule_of(ON_NODES, NODES)
    row, experts = 64 * 4, 16
    by_node = (
        4096 * 2 * (1 - (8 * 7) / (experts * 15))
    )  # tokens times nodes with one of their experts
    by_rank = 4096 * 8 * (1 - (14 * 13) / (experts * 15))
    copied = (by_node + by_rank) * row / 1e12
    for pipeline, beside, calls in ((schedule.forward, 0, 1), (schedule.backward, 4, 1.5)):
        between, inside = pipeline.all_to_all, pipeline.all_gather
        more = (row + beside) / row  # gradients of two weights come back beside the rows
        assert between.call_seconds == pytest.approx(calls * (1e-5 + 3e-6))
        assert between.work_seconds == pytest.approx(more * by_node * row / 2 * 1e-10)
        assert inside.call_seconds == pytest.approx(calls * 2e-6)
        assert inside.work_seconds == pytest.approx(more * (by_rank * row * 3 / 4 * 1e-11 + copied))
        assert pipeline.reduce_scatter == inside
        assert not pipeline.inside_first
    static = schedule_of(
        dataclasses.replace(ON_NODES, dispatcher="static", capacity=100), NODES
    ).backward
    sent = 2 * 8 * 100 * row
    assert static.inside_first
    assert static.all_to_all.work_seconds == pytest.approx(sent / 2 * 1e-10)
    assert static.all_gather.work_seconds == pytest.approx(sent * 3 / 4 * 1e-11 + 2 * sent / 1e12)
    with pytest.raises(ValueError, match="between_nodes must be measured or given"):
        schedule_of(ON_NODES, MODEL)


def random_stages(generator: random.Random, count: int) -> list[Stage]:
    return [Stage(generator.uniform(0, 0.2), generator.uniform(0, 4)) for _ in range(count)]


def test_one_link_takes_the_time_of_the_pipeline():
    generator = random.Random(1)
    for _ in range(50):
        link, experts = random_stages(generator, 2)
        reduce = generator.choice((0.0, generator.uniform(0, 5)))
        for degree in (1, 2, 3, 8):
            plain = Pipeline(link, NOTHING, NOTHING, experts, reduce)
            region = RegionPipeline(link, NOTHING, NOTHING, experts, reduce)
            assert region.seconds(degree) == pytest.approx(plain.seconds(degree))
            assert region.window(degree) == pytest.approx(plain.window(degree))
            assert region.case(degree) == plain.case(degree)


def test_two_links_take_no_less_than_each_lane_and_at_most_a_chunk_more_than_the_pipeline():
    generator = random.Random(2)
    for inside_first in (False, True):
        for _ in range(50):
            between, inside, experts = random_stages(generator, 3)
            region = RegionPipeline(between, inside, inside, experts, inside_first=inside_first)
            outer, inner = (inside, between) if inside_first else (between, inside)
            ideal = Pipeline(outer, inner, inner, experts)
            for degree in (1, 2, 3, 8):
                seconds = region.seconds(degree)
                a2a, near, work = (stage.seconds(degree) for stage in (between, inside, experts))
                lanes = (2 * degree * a2a, 2 * degree * near, degree * work)
                assert seconds > max(*lanes, 2 * a2a + 2 * near + work) - 1e-9
                if near > a2a:
                    continue  # a chunk is sent on too late where the links between nodes are the fast ones
                # All chunks pass the short link before the first expert, where that comes first.
                more = 2 * (a2a + near) + degree * near * inside_first
                assert seconds < ideal.seconds(degree) + more, (region, degree)


def test_gradients_of_weights_run_beside_the_last_answers():
    """Two chunks of 1 s there, 2 + 2 s of experts, 1 s back: the last answers are there before the last gradients."""
    link, experts = Stage(0.0, 2.0), Stage(0.0, 4.0)
    split = RegionPipeline(link, NOTHING, NOTHING, experts, weight_gradients=experts)
    whole = RegionPipeline(link, NOTHING, NOTHING, experts.repeated(2))
    assert whole.seconds(2) == 1 + 2 * 4 + 1
    assert split.seconds(2) == 1 + 2 * 4
    combine = [task for task in split.timeline(2) if task.name == "combine"]
    assert [(task.start, task.end) for task in combine] == [(3, 4), (5, 6)]
    # One chunk: the exchange back is hidden.
    assert whole.seconds(1) == 2 + 8 + 2
    assert split.seconds(1) == 2 + 8
    # What hides an all-reduce hides more of it.
    assert split.window(2) == split.seconds(2) - 4 == 5
    assert replace_reduce(split, 5.0).seconds(2) == pytest.approx(9)
    assert replace_reduce(split, 6.0).seconds(2) == pytest.approx(10)


def test_the_backward_of_a_schedule_hides_its_last_exchange():
    """By as much as its experts' weights take, where these and the exchange take long."""
    slow = dataclasses.replace(MODEL, inside_node=LinkLaw(0.0, 0.0, 1e-9))
    schedule = schedule_of(SIZES, slow)
    backward = schedule.backward
    exchange, weights = backward.all_to_all.seconds(1), backward.weight_gradients.seconds(1)
    hidden = schedule.backward_seconds(1, 1) - schedule.backward_seconds(1, 2)
    assert hidden == pytest.approx(min(exchange, weights) - schedule.recut_seconds)
    assert backward.undivided().seconds(1) == pytest.approx(2 * exchange + 2 * weights)


def replace_reduce(pipeline: RegionPipeline, seconds: float) -> RegionPipeline:
    return dataclasses.replace(pipeline, all_reduce_seconds=seconds)


def dispatcher_of(record, model=MODEL):
    group = RankGroup("0", 2, 0)
    ranks = ExpertRanks("FMoE", 4, group, top_k=2)
    return build_dispatcher(dataclasses.replace(record, mlps=MLPS), ranks)


class Holder(nn.Module):
    def __init__(self, dispatcher):
        super().__init__()
        self.dispatcher = dispatcher


def test_explain_says_what_the_model_says():
    model = nn.ModuleDict({"block": Holder(dispatcher_of(Exact(n_chunks=(4, 3))))})
    text = explain(model, cost_model=MODEL, num_tokens=4096)
    schedule = schedule_of(dataclasses.replace(SIZES, dispatcher="exact"), MODEL)
    assert text.startswith("block: exact, chunks: 4 forward, 3 backward\n")
    for pipeline, degree, seconds in (
        (schedule.forward, 4, schedule.forward_seconds(4)),
        (schedule.backward, 3, schedule.backward_seconds(3, 4)),
    ):
        assert f"{1e3 * seconds:.3f} ms, case {pipeline.case(degree).number}: " in text
        assert all(f"    {line}\n" in f"{text}\n" for line in text_timeline(pipeline, degree))
    assert "no cost model" in explain(model)
    assert "4096 tokens" in explain(Holder(dispatcher_of(Static(1024))), cost_model=MODEL)
    with pytest.raises(ValueError, match="num_tokens must be given for a cost model, got None"):
        explain(model, cost_model=MODEL)
    with pytest.raises(ValueError, match="explain: model must have a layer with a dispatcher"):
        explain(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="explain: cost_model must be a CostModel or None, got 3"):
        explain(model, cost_model=3)
    with pytest.raises(TypeError, match=r"explain: model must be a torch.nn.Module, got 3"):
        explain(3)


def test_a_timeline_shows_who_waits_for_whom():
    pipeline = Pipeline(Stage(0.0, 2.0), Stage(0.0, 0.0), Stage(0.0, 0.0), Stage(0.0, 4.0))
    lines = text_timeline(pipeline, degree=2, columns=12)  # two for a second
    assert lines == ["links   1122..11..22", "experts ..11112222.."]


def test_auto_asks_for_what_it_needs():
    assert dispatcher_of(
        Gather(n_chunks=AutoChunks(cost_model=MODEL), max_tokens=4096)
    ).degrees == (1, 1)
    one = FMoETransformerMLP(
        4, 8, 16, dispatch=Static(2, n_chunks=AutoChunks(cost_model=MODEL, num_tokens=8))
    )
    choose_degrees(one.dispatcher, None)
    assert one.dispatcher.degrees == (1, 1)  # one rank
    for n_chunks, error, message in (
        ("fast", ValueError, r'n_chunks must be an int, a pair .* or "auto", got \'fast\''),
        ((1, 2, 3), ValueError, r"n_chunks must be one int or a pair .*, got \(1, 2, 3\)"),
        ((1, 0), ValueError, "n_chunks must be at least 1, got 0"),
        (AutoChunks(cost_model=MODEL, num_tokens=0), ValueError, "num_tokens must be at least 1"),
        (AutoChunks(cost_model=3), TypeError, "cost_model must be a CostModel, or None to measure"),
    ):
        for record in (Exact, Gather, Static):
            with pytest.raises(error, match=f"FMoE: {message}"):
                dispatcher_of(record(n_chunks=n_chunks))
