"""Checks of the schedule of expert-parallel layers, eager and compiled, run by every rank of a group."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from moeops import compile as schedule
from moeops.comm.order import _compared
from processes import GROUP_TIMEOUT, Ranks


def calls_of(code: str, *names: str) -> list[str]:
    """The ops of these names that generated code calls, in order."""
    calls = re.findall(r"torch\.ops\.(?:_c10d_functional|moeops)\.(\w+)\.default\(", code)
    return [name for name in calls if name in names]


def check_another_order_is_an_error_on_every_rank(ranks: Ranks) -> None:
    ops = torch.ops._c10d_functional

    def two_sums(x, flip):
        if flip:
            largest, total = ops.all_reduce(x, "max", "0"), ops.all_reduce(x, "sum", "0")
        else:
            total, largest = ops.all_reduce(x, "sum", "0"), ops.all_reduce(x, "max", "0")
        return ops.wait_tensor(total) - ops.wait_tensor(largest)

    x = torch.arange(3.0, device=ranks.device)
    compiled = torch.compile(
        two_sums, fullgraph=True, options=schedule.options(torch.nn.Identity())
    )
    last = ranks.rank == ranks.size - 1
    start = time.monotonic()
    message = r"order on every rank of group '0'.* got 'all_reduce of float32 in group 1 by \w+' as number 1 of 2"
    with pytest.raises(RuntimeError, match=message):
        compiled(x, last)
    assert time.monotonic() - start < GROUP_TIMEOUT
    before = len(_compared["0"])
    _, codes = run_and_get_code(compiled, x, False)
    assert len(_compared["0"]) == before + 1
    # Before the first collective, in code that did not have to be compiled on the other ranks.
    for code in codes:
        calls = calls_of(code, "check_order_", "all_reduce", "all_reduce_")
        assert [name.rstrip("_") for name in calls] == ["check_order", *["all_reduce"] * 2]
    assert torch.equal(compiled(x, False), x * (ranks.size - 1))
    assert len(_compared["0"]) == before + 1
