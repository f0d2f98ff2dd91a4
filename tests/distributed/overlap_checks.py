"""Checks of what runs at the same time, run by every rank of a group: links of known speed, and experts that sleep.

Neither takes time of the CPU, so that two ranks overlap on one core as they would on devices of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from parallel_cases import TableGate, even
from torch import Tensor, nn

from moeops import FMoE
from moeops.cost.pipeline import Pipeline, Stage
from moeops.dispatch.base import DispatchOptions
from moeops.dispatch.options import Exact, Static
from processes import Ranks
from timed_backend import TimedGroup, start_group

D, TOKENS = 8, 24  # of each rank
CALL = 0.02  # seconds of a collective, and of an expert
LINK = 0.1  # seconds of all rows that leave a rank one way
WORK = 0.2  # seconds of the experts for all rows of a rank; their backward takes twice as long
CLOSE = 0.15
SAMPLES = 12  # at most
IN_ORDER = {
    "reorder_for_peak_memory": False
}  # or Inductor moves waits right behind what they wait for


@torch.library.custom_op("moeops_tests::sleep", mutates_args=())
def sleep(x: Tensor, call_seconds: float, row_seconds: float) -> Tensor:
    time.sleep(call_seconds + row_seconds * x.shape[0])
    return x.clone()


def _save(ctx, inputs, output):
    _, *seconds = inputs
    ctx.seconds = [2 * value for value in seconds]


sleep.register_fake(lambda x, *_: torch.empty_like(x))
sleep.register_autograd(
    lambda ctx, grad: (sleep(grad, *ctx.seconds), None, None), setup_context=_save
)


class Sleeper(nn.Module):
    """An expert that takes a known time for the rows of all tokens of two ranks."""

    def __init__(self, d_model: int) -> None:
        super().__init__()

    def forward(self, rows: Tensor) -> Tensor:
        return sleep(rows, CALL, WORK / (2 * TOKENS))


def make(dispatch: DispatchOptions, group: TimedGroup) -> FMoE:
    layer = FMoE(
        1, D, expert=Sleeper, world_size=2, moe_group=group, top_k=2, gate=TableGate,
        dispatch=dispatch,
    )  # fmt: skip
    layer.gate.set_routing(even)  # each token goes to the experts of both ranks
    return layer


def batch() -> Tensor:
    x = torch.zeros(TOKENS, D)
    x[:, 0] = torch.arange(TOKENS)
    return x.requires_grad_()


def predicted(degree: int) -> list[float]:
    """Seconds of forward and backward; no links are inside a node."""
    nothing, link, experts = Stage(0.0, 0.0), Stage(CALL, LINK), Stage(CALL, WORK)
    pipelines = (Pipeline(link, nothing, nothing, experts.repeated(times)) for times in (1, 2))
    return [pipeline.seconds(degree) for pipeline in pipelines]


def measured(layer: Callable[[Tensor], Tensor], group: TimedGroup, close_to: list[float]):
    """Seconds of forward and backward, the least of some samples: what else runs on the machine only adds to them.

    There are no more samples once both are close to what is expected.
    """
    x = batch()
    least = torch.full((2,), torch.inf, dtype=torch.float64)
    for _ in range(SAMPLES):
        dist.barrier()
        group.set_link(CALL, LINK / (TOKENS * D * x.element_size()))
        begin = time.perf_counter()
        y = layer(x)
        middle = time.perf_counter()
        y.sum().backward()
        sample = torch.tensor([middle - begin, time.perf_counter() - middle], dtype=torch.float64)
        least = torch.minimum(least, sample)
        slowest = least.clone()
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if bool((slowest < (1 + CLOSE / 3) * torch.tensor(close_to)).all()):
            break
    group.set_link()
    return slowest.tolist()


def assert_close(got: list[float], expected: list[float], what: str) -> None:
    ratios = [one / other for one, other in zip(got, expected, strict=True)]
    assert all(1 / (1 + CLOSE) < ratio < 1 + CLOSE for ratio in ratios), (what, got, expected)


def check_the_backend_computes_what_gloo_does(ranks: Ranks) -> None:
    """Every collective that layers use, functional ones in eager mode and compiled; all are in flight together."""
    timed, plain = start_group(), dist.group.WORLD
    ops = torch.ops._c10d_functional
    splits = [1, 2] if ranks.rank == 0 else [2, 1]  # as many come as go

    def run(x: Tensor, name: str) -> list[Tensor]:
        begun = [
            ops.all_gather_into_tensor(x, 2, name),
            ops.reduce_scatter_tensor(torch.cat((x, 2 * x)), "sum", 2, name),
            ops.all_to_all_single(x, splits, splits, name),
            ops.all_reduce(x, "sum", name),
            *ops.all_reduce_coalesced([x, 3 * x[:, :1]], "sum", name),
        ]
        return [ops.wait_tensor(each) for each in begun]

    x = torch.randn(3, 4) + ranks.rank
    expected = run(x, plain.group_name)
    timed.set_link(0.02)
    begin = time.perf_counter()
    torch.testing.assert_close(run(x, timed.group_name), expected)
    assert time.perf_counter() - begin > 5 * 0.02  # one after the other
    assert timed.most_in_flight == 5
    assert [sent.op for sent in timed.sent] == [
        "all_gather", "reduce_scatter", "all_to_all", "all_reduce", "all_reduce",
    ]  # fmt: skip
    assert [entry.num_bytes for entry in timed.sent] == [48, 48, 32, 48, 60]
    compiled = torch.compile(run, fullgraph=True, options=IN_ORDER)
    torch.testing.assert_close(compiled(x, timed.group_name), expected)
    timed.set_link()
    objects = [None, None]
    dist.all_gather_object(objects, ranks.rank, group=timed)
    assert objects == [0, 1]
    x = torch.arange(3.0)
    work = dist.all_reduce(x, group=timed, async_op=True)
    work.wait()
    assert work.is_completed()
    torch.testing.assert_close(x, 2 * torch.arange(3.0))


def assert_takes(module, group, expected, what) -> None:
    """One of five measurements fits, all of which have the same result on every rank: others may use the machine."""
    for attempt in range(5):
        times = measured(module, group, expected)
        try:
            return assert_close(times, expected, what)
        except AssertionError:
            if attempt == 4:
                raise


def check_chunks_take_the_time_of_the_pipeline(ranks: Ranks) -> None:
    """Exact has an exchange of counts before the first chunk; otherwise both are FSMoE's pipeline."""
    group = start_group()
    for degree in (1, 2, 4):
        forward, backward = predicted(degree)
        layer = make(Exact(n_chunks=degree), group)
        expected = [forward + CALL, backward]
        assert_takes(layer, group, expected, f"exact, {degree}")
        layer = make(Static(capacity=TOKENS, n_chunks=degree), group)
        expected = [forward, backward]
        assert_takes(layer, group, expected, f"static, {degree}")


def check_compiled_chunks_take_the_time_of_the_pipeline(ranks: Ranks) -> None:
    group = start_group()
    layer = make(Static(capacity=TOKENS, n_chunks=2), group)
    compiled = torch.compile(layer, fullgraph=True, options=IN_ORDER)
    compiled(batch()).sum().backward()
    assert_takes(compiled, group, predicted(2), "compiled")
    group.set_link(CALL)
    compiled(batch()).sum().backward()
    assert group.most_in_flight == 2
