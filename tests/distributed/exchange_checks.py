"""Checks of rows and counts between ranks, run by every rank of a group."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moeops.comm.exchange import Exchange, all_to_all_rows, exchange_counts
from moeops.distributed import all_gather_counts, all_reduce_sum, rank_group
from processes import Ranks

DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn),
)


def tables(size: int) -> dict[str, list[list[int]]]:
    """``table[i][j]`` rows go from rank i to rank j."""
    return {
        "even": [[2] * size] * size,
        "uneven": [[(3 * i + 5 * j) % 4 for j in range(size)] for i in range(size)],
        "empty": [[0] * size] * size,
        "all_to_one": [[3 + i if j == size - 1 else 0 for j in range(size)] for i in range(size)],
        "one_sends": [[4 if i == 0 else 0 for _ in range(size)] for i in range(size)],
    }


def problem(ranks: Ranks, table, *shape: int):
    """Rows of every rank, the splits of this one, and what it must receive."""
    sizes = [sum(row) for row in table]
    generator = torch.Generator().manual_seed(3)
    everything = [torch.randn(size, *shape, generator=generator) * 3 for size in sizes]
    parts = [rows.split(table[i])[ranks.rank] for i, rows in enumerate(everything)]
    rows = everything[ranks.rank].to(ranks.device)
    output_splits = [table[i][ranks.rank] for i in range(ranks.size)]
    return rows, table[ranks.rank], output_splits, torch.cat(parts).to(ranks.device)


def check_values(ranks: Ranks) -> None:
    for table in tables(ranks.size).values():
        for shape in ((5,), (), (2, 3), (0,)):
            rows, sends, receives, expected = problem(ranks, table, *shape)
            received = all_to_all_rows(rows, sends, receives, dist.group.WORLD)
            assert torch.equal(received, expected)
            back = all_to_all_rows(received, receives, sends, dist.group.WORLD)
            assert torch.equal(back, rows)


def check_every_dtype(ranks: Ranks) -> None:
    rows, sends, receives, expected = problem(ranks, tables(ranks.size)["uneven"], 5)
    for dtype in DTYPES:
        for layout in (rows, rows.t().contiguous().t()):  # the second is not contiguous
            received = all_to_all_rows(layout.to(dtype), sends, receives, dist.group.WORLD)
            assert received.dtype == dtype
            assert torch.equal(received.to(torch.complex64), expected.to(dtype).to(torch.complex64))


def check_counts(ranks: Ranks) -> None:
    counts = torch.arange(ranks.size * 3).view(ranks.size, 3) + 100 * ranks.rank
    received = exchange_counts(counts.to(ranks.device), dist.group.WORLD).cpu()
    expected = torch.arange(3) + 3 * ranks.rank + 100 * torch.arange(ranks.size)[:, None]
    assert torch.equal(received, expected)


def check_collectives(ranks: Ranks) -> None:
    class Both(torch.nn.Module):
        def __init__(self, group):
            super().__init__()
            self.group = group

        def forward(self, x):
            return all_gather_counts(x, self.group), all_reduce_sum(x, self.group)

    for group in (dist.group.WORLD, rank_group(dist.group.WORLD)):
        module = Both(group)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((3,), (2, 2), (0,), ()):
            every = torch.stack([torch.ones(shape) * (rank + 1) for rank in range(ranks.size)])
            x = every[ranks.rank].to(ranks.device).requires_grad_()
            for gathered, total in (module(x), compiled(x)):
                assert torch.equal(gathered.cpu(), every)
                assert torch.equal(total.cpu(), every.sum(0))
                assert not gathered.requires_grad
                assert not total.requires_grad
                assert gathered.data_ptr() != x.data_ptr() or not x.numel()


def gradients(function, rows, counts, direction):
    rows = rows.detach().requires_grad_()
    received = function(rows, counts)
    (grad,) = torch.autograd.grad(received, rows, direction)
    return received.detach(), grad


def check_gradients_and_compilation(ranks: Ranks) -> None:
    group = rank_group(dist.group.WORLD)

    def run(rows, counts):
        received_counts = exchange_counts(counts, group)
        sends, receives = torch.stack([counts, received_counts]).cpu().tolist()
        return all_to_all_rows(torch.tanh(rows), sends, receives, group) * 2

    compiled = {
        backend: torch.compile(run, fullgraph=True, backend=backend, dynamic=True)
        # Four ranks share two cores, and Inductor does nothing else for four than for two.
        for backend in (("aot_eager", "inductor") if ranks.size == 2 else ("aot_eager",))
    }
    for name, table in tables(ranks.size).items():
        rows, sends, receives, expected = problem(ranks, table, 5)
        counts = torch.tensor(sends, device=ranks.device)
        direction = torch.randn(expected.shape, device=ranks.device)
        sent_direction = all_to_all_rows(direction, receives, sends, group)
        wanted = 2 * sent_direction * (1 - torch.tanh(rows).square())
        for function in (run, *compiled.values()):
            received, grad = gradients(function, rows, counts, direction)
            torch.testing.assert_close(received, 2 * torch.tanh(expected), msg=name)
            torch.testing.assert_close(grad, wanted, msg=name)
        # A gradient that is expanded and not contiguous.
        received = run(rows.requires_grad_(), counts)
        received.sum().backward()
        torch.testing.assert_close(rows.grad, 2 * (1 - torch.tanh(rows.detach()).square()))


def check_second_gradient(ranks: Ranks) -> None:
    rows, sends, receives, _ = problem(ranks, tables(ranks.size)["uneven"], 2)
    rows = rows.double().requires_grad_()

    def cubes(rows):
        return all_to_all_rows(rows, sends, receives, dist.group.WORLD).pow(3)

    (grad,) = torch.autograd.grad(cubes(rows).sum(), rows, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), rows)
    torch.testing.assert_close(grad, 3 * rows.square())
    torch.testing.assert_close(second, 6 * rows)


def check_anomaly_mode(ranks: Ranks) -> None:
    rows, sends, receives, _ = problem(ranks, tables(ranks.size)["even"], 2)
    rows.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        all_to_all_rows(rows, sends, receives, dist.group.WORLD).square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * rows)


def check_opcheck(ranks: Ranks) -> None:
    """All of it with one rank; with more, what torch's wait_tensor below this op lets pass, and the fake's result."""
    op = torch.ops.moeops.all_to_all_rows.default
    rows, sends, receives, _ = problem(ranks, tables(ranks.size)["uneven"], 2)
    name = rank_group(dist.group.WORLD).name
    # The other two tests compare aliases: wait_tensor returns its argument, and its fake a new tensor.
    tests = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    strided = rows.t().contiguous().t()
    cases = (rows, strided, rows.to(torch.complex64), rows.to(torch.int16))
    for case in (
        cases if ranks.size == 2 else cases[:1]
    ):  # nothing here depends on the number of ranks
        case.requires_grad_(case.dtype != torch.int16)
        alone = torch.library.opcheck(op, (case, [len(case)], [len(case)], ""))
        assert len(alone) >= 4
        together = torch.library.opcheck(op, (case, sends, receives, name), test_utils=tests)
        assert set(alone.values()) == set(together.values()) == {"SUCCESS"}
        received = op(case, sends, receives, name)
        with FakeTensorMode() as mode:
            fake = op(mode.from_tensor(case), sends, receives, name)
        assert (fake.shape, fake.dtype) == (received.shape, received.dtype)
        assert fake.stride() == received.stride()
        assert fake.requires_grad == received.requires_grad


def check_graph_shows_functional_collectives(ranks: Ranks) -> None:
    """Passes see the op in the graph that Dynamo captured, and torch's collectives below autograd."""
    rows, sends, receives, _ = problem(ranks, tables(ranks.size)["even"], 2)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def run(rows):
        return all_to_all_rows(rows, sends, receives, dist.group.WORLD)

    torch.compile(run, fullgraph=True, backend=backend)(rows)
    assert seen.count("moeops.all_to_all_rows") == 1
    below = [str(node.target) for node in make_fx(run, tracing_mode="fake")(rows).graph.nodes]
    assert below.count("_c10d_functional.all_to_all_single.default") == 1
    assert below.count("_c10d_functional.wait_tensor.default") == 1
    assert not any("moeops" in target for target in below)


def check_torch_blocks_where_nobody_looks(ranks: Ranks) -> None:
    """Eager exchanges are torch's own, forward and backward; a mode, and what the compiler sees, are functional."""
    rows, sends, receives, expected = problem(ranks, tables(ranks.size)["uneven"], 2)
    rows.requires_grad_()
    group, blocking = rank_group(dist.group.WORLD), []
    right = dist.all_to_all_single

    def spy(*args, **kwargs):
        blocking.append(args)
        return right(*args, **kwargs)

    def run():
        exchange_counts(torch.ones(ranks.size, device=ranks.device), group)
        received = all_to_all_rows(rows, sends, receives, group)
        torch.testing.assert_close(received, expected)
        (grad,) = torch.autograd.grad(received, rows, expected)
        torch.testing.assert_close(grad, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", spy)
        run()
        assert len(blocking) == 3
        with Functional() as seen:
            run()
        assert (len(blocking), seen.count) == (3, 3)
        Exchange(rows, sends, receives, group).finish()  # may overlap with other work
        assert len(blocking) == 3


class Functional(TorchDispatchMode):
    """Counts functional exchanges."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops._c10d_functional.all_to_all_single.default
        return func(*args, **(kwargs or {}))


def check_transforms_are_refused(ranks: Ranks) -> None:
    """Derivatives that this op does not have are errors, and not zero."""
    rows, sends, receives, _ = problem(ranks, tables(ranks.size)["even"], 2)

    def run(rows):
        return all_to_all_rows(rows, sends, receives, dist.group.WORLD)

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda rows: run(rows).sum())(rows)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(run)(rows.unsqueeze(0))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        run(forward_ad.make_dual(rows, rows))


def check_several_in_flight(ranks: Ranks) -> None:
    """Their results do not depend on the order in which they are waited for, in both directions."""
    rows, sends, receives, expected = problem(ranks, tables(ranks.size)["uneven"], 3)
    group = rank_group(dist.group.WORLD)
    rows.requires_grad_()
    exchanges = [Exchange(rows * factor, sends, receives, group) for factor in (1, 2, 3)]
    results = [exchange.finish() for exchange in reversed(exchanges)]
    for result, factor in zip(results, (3, 2, 1), strict=True):
        torch.testing.assert_close(result, factor * expected)
    sum(results).sum().backward()
    torch.testing.assert_close(rows.grad, torch.full_like(rows, 6))


def check_group_of_this_rank_alone(ranks: Ranks) -> None:
    groups = [dist.new_group([rank]) for rank in range(ranks.size)]
    rows = torch.randn(4, 2, device=ranks.device, requires_grad=True)
    for group in (groups[ranks.rank], None):
        received = all_to_all_rows(rows, [4], [4], group)
        assert torch.equal(received, rows)
        assert received.data_ptr() != rows.data_ptr()
        assert received.requires_grad
    outsider = groups[(ranks.rank + 1) % ranks.size]
    with pytest.raises(ValueError, match="group must hold this rank"):
        rank_group(outsider)


def check_wrong_splits(ranks: Ranks) -> None:
    rows, sends, receives, _ = problem(ranks, tables(ranks.size)["even"], 2)
    group = dist.group.WORLD
    cases = [
        (rows, [1] * ranks.size, receives, f"input_splits must add up to the {len(rows)} rows"),
        (rows, sends[:-1], receives, f"input_splits must have {ranks.size} entries"),
        (rows, sends, [*receives, 0], f"output_splits must have {ranks.size} entries"),
        (rows, sends, [-1, *receives[1:]], "output_splits must be at least 0, got -1"),
        (rows.sum(), sends, receives, "rows must have at least 1 dimension"),
    ]
    for *args, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            all_to_all_rows(*args, group)


def check_disagreement_is_an_error_on_every_rank(ranks: Ranks) -> None:
    rows, sends, receives, expected = problem(ranks, tables(ranks.size)["even"], 2)
    group = dist.group.WORLD
    os.environ["MOEOPS_DEBUG_CHECKS"] = "1"
    try:
        assert torch.equal(all_to_all_rows(rows, sends, receives, group), expected)
        wrong = [receives[0] + 1, *receives[1:]] if ranks.rank == 1 else receives
        with pytest.raises(ValueError, match=re.escape("output_splits[0] on rank 1 must be")):
            all_to_all_rows(rows, sends, wrong, group)
        other = rows.double() if ranks.rank == 1 else rows
        with pytest.raises(ValueError, match=r"torch.float32 on rank 0 and 2 x torch.float64 on"):
            all_to_all_rows(other, sends, receives, group)
        other = rows[:, :1] if ranks.rank == 1 else rows
        with pytest.raises(ValueError, match=r"2 x torch.float32 on rank 0 and 1 x torch.float32"):
            all_to_all_rows(other, sends, receives, group)
    finally:
        del os.environ["MOEOPS_DEBUG_CHECKS"]
    assert torch.equal(all_to_all_rows(rows, sends, receives, group), expected)
