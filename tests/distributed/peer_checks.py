"""Checks of exchanges by peer memory, run by every rank of a group; on a CPU gloo stands in for the copies."""

from __future__ import annotations

import contextlib
import itertools
import unittest.mock
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from parallel_cases import (
    all_to_one,
    assert_equals_whole,
    batch,
    even,
    make,
    make_pair,
    uneven,
)
from torch._inductor.utils import run_and_get_code

import moeops
from moeops.comm.gathering import (
    GATHERS,
    AllGather,
    Gathering,
    ReduceScatter,
    reduce_scatter_rows,
)
from moeops.comm.groups import RankGroup, rank_group
from moeops.comm.peer import FIRST_BYTES, open_peer_memory
from processes import Ranks

_library = torch.library.Library("moeops", "FRAGMENT")


def _group(name: str, size: int) -> RankGroup:
    return RankGroup(name, size, dist.get_rank())


_library.impl(
    "peer_all_gather",
    lambda rows, size, name: AllGather(_group(name, size)).send(rows.contiguous()),
    "CPU",
    allow_override=True,
)
_library.impl(
    "peer_reduce_scatter",
    lambda rows, size, name: ReduceScatter(_group(name, size)).send(rows.contiguous()),
    "CPU",
    allow_override=True,
)


@contextlib.contextmanager
def opened(ranks: Ranks) -> Iterator[RankGroup]:
    """The group of all ranks, which see each other's memory, or act as if they did."""
    group = rank_group(dist.group.WORLD)
    assert group is not None
    if ranks.device != "cpu":
        open_peer_memory("peer_checks", group)
        yield group
        return
    with unittest.mock.patch("moeops.dispatch.gather.open_peer_memory"):
        yield group


def everyone(ranks: Ranks, shape, dtype) -> torch.Tensor:
    """Rows of all ranks, ``[W, ...]``, small integers, the same everywhere."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randint(-9, 10, (ranks.size, *shape), generator=generator)
    return values.to(ranks.device, dtype)


def check_rows_and_sums(ranks: Ranks) -> None:
    """Types, sizes, nothing at all, and more than there was room for; gradients are each other."""
    with opened(ranks) as group:
        many = FIRST_BYTES // 64
        for shape, dtype in (
            ((5, 3), torch.float32), ((1,), torch.bfloat16), ((0, 4), torch.float32),
            ((7, 2), torch.int16), ((many, 3), torch.bfloat16), ((3, 5), torch.float64),
        ):  # fmt: skip
            rows = everyone(ranks, shape, dtype)
            got = Gathering(rows[ranks.rank], group, "peer").finish()
            assert torch.equal(got, rows.flatten(0, 1)), (shape, dtype)
        for shape, dtype in (((4, 3), torch.float32), ((many, 2), torch.bfloat16)):
            parts = everyone(ranks, (ranks.size, *shape), dtype)
            got = reduce_scatter_rows(parts[ranks.rank].flatten(0, 1), group, "peer")
            assert torch.equal(got, parts[:, ranks.rank].sum(0)), (shape, dtype)
        x = everyone(ranks, (3, 2), torch.float64)[ranks.rank].requires_grad_()
        weights = torch.arange(1.0, 6.0 * ranks.size + 1, dtype=torch.float64, device=ranks.device)
        weights = weights.view(-1, 2)
        y = Gathering(x, group, "peer").finish()
        (grad,) = torch.autograd.grad((y * weights).sum() * (1 + ranks.rank), x)
        share = weights.view(ranks.size, 3, 2)[ranks.rank]
        torch.testing.assert_close(grad, share * sum(range(1, ranks.size + 1)))


def check_many_at_once(ranks: Ranks) -> None:
    """Exchanges that are on their way together, in many laps of the memory, while rows are written over."""
    with opened(ranks) as group:
        wire = GATHERS["peer"](group)
        counts = (1000, 33, 500, 20000)
        for turn in range(20 if ranks.device == "cpu" else 200):
            flights = []
            for count in counts:
                rows = torch.full((count, 4), float(turn + ranks.rank), device=ranks.device)
                flights.append(
                    (Gathering(rows, group, "peer"), wire.turn().send(rows.repeat(ranks.size, 1)))
                )
                rows.fill_(-1.0)
            for count, (gathering, sums) in zip(counts, flights, strict=True):
                every = turn + torch.arange(float(ranks.size), device=ranks.device)
                assert torch.equal(
                    gathering.finish(), every.repeat_interleave(count)[:, None].expand(-1, 4)
                )
                total = torch.ops._c10d_functional.wait_tensor(sums)
                assert torch.equal(total, every.sum().expand(count, 4))


def check_layers_equal_one_rank(ranks: Ranks) -> None:
    """One call, regions with chunks, modules, nests; two groups in one process."""
    with opened(ranks):
        cases = (("mlp", 1), ("mlp", (2, 3)), ("mlp", 2), ("modules", 1), ("nested", 1))
        for (kind, n_chunks), routing in itertools.product(cases, (even, uneven, all_to_one)):
            part, whole = make_pair(
                kind, ranks, dispatch="gather", rows=float(ranks.size), n_chunks=n_chunks, transport="peer",
            )  # fmt: skip
            assert part.dispatcher.transport == "peer"
            assert_equals_whole(part, part, whole, kind, ranks, [6] * ranks.size, routing)
        other = dist.new_group(list(range(ranks.size)))
        part, whole = make_pair(
            "mlp",
            ranks,
            dispatch="gather",
            rows=float(ranks.size),
            transport="peer",
            moe_group=other,
        )
        assert_equals_whole(part, part, whole, "mlp", ranks, [5] * ranks.size, uneven)


def check_compiled(ranks: Ranks) -> None:
    """One graph of peer ops, whose order ranks compare."""
    with opened(ranks):
        for n_chunks in (1, (2, 1)):
            torch._dynamo.reset()
            part, whole = make_pair(
                "mlp", ranks, dispatch="gather", rows=float(ranks.size), n_chunks=n_chunks, transport="peer",
            )  # fmt: skip
            options = moeops.compile.options(part)
            compiled = torch.compile(part, fullgraph=True, options=options)
            counts = [6] * ranks.size
            _, codes = run_and_get_code(
                assert_equals_whole, compiled, part, whole, "mlp", ranks, counts, uneven
            )
            text = "\n".join(codes)
            assert "moeops.peer_all_gather.default(" in text
            assert "moeops.peer_reduce_scatter.default(" in text
            assert "peer_all_gather of float64 in group 1" in text


def check_a_cuda_graph(ranks: Ranks) -> None:
    """Replays with other tokens, between eager steps."""
    if ranks.device == "cpu":
        return
    with opened(ranks), torch.no_grad():
        part, whole = make_pair(
            "mlp", ranks, dispatch="gather", rows=float(ranks.size), transport="peer"
        )
        for layer in (part, whole):
            layer.gate.set_routing(uneven)
        x = batch(6 * ranks.size, ranks.device)
        mine = x.view(ranks.size, 6, -1)[ranks.rank].clone()
        for _ in range(3):
            part(mine)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = part(mine)
        for turn in range(5):
            x[:, 1:] = torch.roll(x[:, 1:], 1, 0)
            mine.copy_(x.view(ranks.size, 6, -1)[ranks.rank])
            graph.replay()
            expected = whole(x).view(ranks.size, 6, -1)[ranks.rank]
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
            if turn % 2:
                torch.testing.assert_close(part(mine), expected, rtol=1e-10, atol=1e-10)


def check_refusals(ranks: Ranks) -> None:
    options = {"world_size": ranks.size, "dispatch": "gather"}
    with pytest.raises(
        ValueError, match=r"transport must be one of \('nccl', 'peer'\), got 'fast'"
    ):
        make("mlp", 2, ranks.device, transport="fast", **options)
    last = ranks.rank == ranks.size - 1
    with pytest.raises((ValueError, RuntimeError), match=r"transport must be (the same|one of)"):
        make("mlp", 2, ranks.device, transport="fast" if last else "nccl", **options)
    if ranks.device == "cpu":
        with pytest.raises(
            ValueError, match=r"transport must be .nccl. where group '\d+' .*'gloo'"
        ):
            make("mlp", 2, ranks.device, transport="peer", **options)
