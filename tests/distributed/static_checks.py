"""Checks of static dispatch where ranks have different numbers of tokens, run by every rank of a group."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_cases import K, batch, loss_of, make, uneven

from moeops.comm.common_size import CommonSize
from moeops.gates import SoftMoEGate
from processes import Ranks

FACTOR = 1.5


def capacity_of(tokens: int, ranks: Ranks) -> int:
    return max(1, math.ceil(FACTOR * tokens * K / (2 * ranks.size)))


def run(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    loss_of(y).backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def check_one_capacity_for_all_ranks(ranks: Ranks) -> None:
    """It is that of the most tokens when all ranks' numbers last changed; nothing is asked while none changes."""
    rank, size = ranks.rank, ranks.size
    steps = [  # tokens of each rank, those that the capacity is for, and whether this rank must ask
        ([5 + 4 * r for r in range(size)], 1 + 4 * size, False),
        ([5 + 4 * r for r in range(size)], 1 + 4 * size, rank != size - 1),
        ([4 * size] * size, 4 * size, True),
        ([4 * size] * size, 4 * size, False),
        ([8 * size] + [4 * size] * (size - 1), 4 * size, rank == 0),
        ([2 * size + 1 + 8 * r for r in range(size)], 10 * size - 7, True),
        ([0] * size, 0, True),
        ([0] * size, 0, False),
    ]
    for options in ({}, {"n_chunks": 3}):
        torch.manual_seed(0)
        layer = make(
            "mlp", 2, ranks.device, world_size=size, dispatch="static", capacity=FACTOR, **options
        )
        layer.gate.set_routing(uneven)
        asking = mock.patch.object(
            CommonSize, "settle", autospec=True, side_effect=CommonSize.settle
        )
        with asking as asked, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for counts, tokens, asks in steps:
                x = batch(counts[rank], ranks.device)
                asked.reset_mock()
                actual = run(layer, x)
                assert asked.called is asks, (counts, tokens)
                fixed = make(
                    "mlp",
                    2,
                    ranks.device,
                    world_size=size,
                    dispatch="static",
                    capacity=capacity_of(tokens, ranks),
                    **options,
                )
                fixed.load_state_dict(layer.state_dict())
                fixed.gate.set_routing(uneven)
                for value, wanted in zip(actual, run(fixed, x), strict=True):
                    torch.testing.assert_close(value, wanted)
        texts = [str(w.message) for w in caught if "as many tokens" in str(w.message)]
        assert len(texts) == (rank == 0), texts


def check_gates_that_mix_tokens(ranks: Ranks) -> None:
    """Shorter batches are filled up; a longer one than the others' is refused on its rank."""
    torch.manual_seed(0)
    # Slots for every sequence of 4 tokens.
    gate = functools.partial(SoftMoEGate, num_slots=3, sequence_length=4)
    options = {"world_size": ranks.size, "gate": gate}
    static = make("mlp", 2, ranks.device, dispatch="static", **options)
    exact = make("mlp", 2, ranks.device, **options)
    exact.load_state_dict(copy.deepcopy(static.state_dict()))
    for tokens in (4 * ranks.size + 4 * ranks.rank, 8 * ranks.size):
        x = batch(tokens, ranks.device)
        for value, wanted in zip(run(static, x), run(exact, x), strict=True):
            torch.testing.assert_close(value, wanted)
    x = batch((16 if ranks.rank == 0 else 8) * ranks.size, ranks.device)
    exchange, begin = static.dispatcher._exchange, static.dispatcher._begin
    rows = static.dispatcher._sort(static.gate(x), x)
    if ranks.rank == 0:
        with pytest.raises(ValueError, match="as the others for a gate that mixes tokens, got"):
            exchange(rows, begin)
    else:
        for flight in exchange(rows, begin)[0]:
            flight.finish()
    dist.barrier()
