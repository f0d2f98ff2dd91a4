"""Checks for several processes: the planner's exchange volumes against what real layers send. W ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_cases import with_record
from torch.utils._python_dispatch import TorchDispatchMode

import moeops
from moeops.planner.configuration import Configuration
from processes import Ranks

SIZES = {"num_experts": 8, "top_k": 2, "d_model": 32, "d_hidden": 16, "num_tokens": 40}


class CountSent(TorchDispatchMode):
    """Adds up the float bytes that this rank hands to exchanges, its own part included."""

    def __init__(self, num_ranks):
        super().__init__()
        self.num_bytes = 0
        self.num_ranks = num_ranks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        ways = {"all_to_all_single": 1, "all_gather_into_tensor": self.num_ranks}
        ways["reduce_scatter_tensor"] = 1
        if name in ways and args[0].is_floating_point():
            self.num_bytes += ways[name] * args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def mean_sent(ranks: Ranks, layer: moeops.FMoETransformerMLP) -> tuple[float, float]:
    """Bytes that a rank sends in a forward, those to itself included, and ranks that a token goes to: means."""
    x = torch.randn(SIZES["num_tokens"], SIZES["d_model"], device=ranks.device)
    with CountSent(ranks.size) as sent, torch.no_grad():
        layer(x)
        ids = layer.gate(x)[0]
    apart = ranks.size // layer.expert_tensor_parallel_size
    owners = torch.nn.functional.one_hot(ids // layer.num_expert, apart).amax(1)
    reached = owners.sum() / len(x) * layer.expert_tensor_parallel_size
    total = torch.stack([torch.tensor(float(sent.num_bytes), device=ranks.device), reached])
    dist.all_reduce(total)
    num_bytes, reached = (total / ranks.size).tolist()
    return num_bytes, reached


def build(ranks: Ranks, config: Configuration, **options) -> moeops.FMoETransformerMLP:
    return moeops.FMoETransformerMLP(
        config.local_experts, config.d_model, config.d_hidden, config.activation, bias=False,
        world_size=ranks.size, device=ranks.device, **with_record(options),
    )  # fmt: skip


def check_exchanged_bytes(ranks: Ranks):
    config = Configuration(world_size=ranks.size, dtype="float32", capacity_factor=1.5, **SIZES)
    for dispatcher, options in (
        ("exact", {}),
        ("static", {"dispatch": "static", "capacity": 1.5}),
        ("exact", {"n_chunks": 2}),
        ("static", {"dispatch": "static", "capacity": 1.5, "n_chunks": 2}),
        ("gather", {"dispatch": "gather"}),
    ):
        num_bytes, reached = mean_sent(ranks, build(ranks, config, **options))
        rows = config.sent_rows(dispatcher)
        if dispatcher == "exact":
            assert reached == pytest.approx(config.reached(ranks.size), rel=0.1)
            rows *= reached / config.reached(ranks.size)
        choices = 0 if dispatcher == "static" else config.choice_bytes
        there_and_back = rows * (2 * config.row_bytes + choices)
        assert num_bytes == pytest.approx(there_and_back), (dispatcher, options)


def check_sharded_bytes(ranks: Ranks):
    config = Configuration(world_size=ranks.size, dtype="float32", tensor_parallel=2, **SIZES)
    layer = build(ranks, config, expert_tensor_parallel_size=2)
    num_bytes, reached = mean_sent(ranks, layer)
    assert reached == pytest.approx(config.reached(ranks.size), rel=0.1)
    rows = config.num_tokens * reached
    assert num_bytes == pytest.approx(rows * (2 * config.row_bytes + config.choice_bytes))
    assert sum(p.numel() for p in layer.experts.parameters()) == config.expert_parameters
