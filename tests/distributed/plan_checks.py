"""Checks for several processes: the planner's exchange volumes against what real layers send. W ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from parallel_cases import with_record
from torch.utils._python_dispatch import TorchDispatchMode

import moeops
from moeops.planner.predict import Configuration
from processes import Ranks

SIZES = {"num_experts": 8, "top_k": 2, "d_model": 32, "d_hidden": 16, "num_tokens": 40}


class CountSent(TorchDispatchMode):
    """Adds up the float bytes that this rank hands to exchanges, its own part included."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_to_all_single" in str(func) and args[0].is_floating_point():
            self.num_bytes += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def mean_sent(ranks: Ranks, layer: moeops.FMoETransformerMLP) -> float:
    """Bytes that a rank sends in a forward, the mean over the ranks."""
    x = torch.randn(SIZES["num_tokens"], SIZES["d_model"], device=ranks.device)
    with CountSent() as sent, torch.no_grad():
        layer(x)
    total = torch.tensor(float(sent.num_bytes), device=ranks.device)
    dist.all_reduce(total)
    return float(total) / ranks.size


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
    ):
        there_and_back = 2 * config.rows(dispatcher) * config.row_bytes
        layer = build(ranks, config, **options)
        assert mean_sent(ranks, layer) == there_and_back, (dispatcher, options)


def check_sharded_bytes(ranks: Ranks):
    config = Configuration(world_size=ranks.size, dtype="float32", tensor_parallel=2, **SIZES)
    layer = build(ranks, config, expert_tensor_parallel_size=2)
    assert mean_sent(ranks, layer) == 2 * config.rows("exact") * config.row_bytes
    assert sum(p.numel() for p in layer.experts.parameters()) == config.expert_parameters
