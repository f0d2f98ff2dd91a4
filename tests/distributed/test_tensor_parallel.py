"""Experts in shards on 2 and 4 processes, whose checks are in tensor_parallel_checks.py, and what needs no process."""

from __future__ import annotations

import pytest
import torch

from moeops import FMoETransformerMLP, Glu
from moeops.dispatch.shards import take_shard
from moeops.layers import FusedExperts
from processes import run_checks

D, H = 7, 12


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo(world_size, tmp_path):
    run_checks("tensor_parallel_checks", world_size, "gloo", tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks("tensor_parallel_checks", world_size, "nccl", tmp_path)


def drawn(**options) -> tuple[FusedExperts, torch.Tensor]:
    """Experts from one random state, and what it draws next."""
    torch.manual_seed(3)
    experts = FusedExperts(2, D, H, **options)
    return experts, torch.rand(4)


@pytest.mark.parametrize("num_shards", [2, 3, 4])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", Glu(interleaved=True)], ids=str)
def test_shards_of_one_random_state_are_one_expert(num_shards, activation):
    """So the fan-in is that of the whole, and what is drawn afterwards is the same on all ranks."""
    whole, after = drawn(activation=activation)
    shards = [
        drawn(activation=activation, num_shards=num_shards, shard=p) for p in range(num_shards)
    ]
    for name, parameter in whole.named_parameters():
        spans = [experts.shard_span(name) for experts, _ in shards]
        parts = [getattr(experts, name).detach() for experts, _ in shards]
        held = torch.zeros_like(parameter, dtype=torch.int64)
        for part, span in zip(parts, spans, strict=True):
            assert torch.equal(take_shard(parameter, span), part)
            assert span.size == parameter.shape[span.dim]
            for start, length in span.ranges:
                held.narrow(span.dim, start, length).add_(1)
        assert (held == 1).all()  # by one shard each
        assert sum(part.numel() for part in parts) == parameter.numel()
    assert all(torch.equal(then, after) for _, then in shards)


def test_shards_add_up():
    whole, _ = drawn(bias=True)
    shards = [drawn(num_shards=4, shard=p)[0] for p in range(4)]
    x = torch.randn(5, D)
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    y = sum(experts(x, expert_offsets=offsets) for experts in shards)
    torch.testing.assert_close(y, whole(x, expert_offsets=offsets))


def test_arguments():
    with pytest.raises(ValueError, match="shard must be below the 2 shards, got 2"):
        FusedExperts(2, D, H, num_shards=2, shard=2)
    with pytest.raises(TypeError, match=r"num_shards must be an int, got 2\.0"):
        FusedExperts(2, D, H, num_shards=2.0)
    with pytest.raises(ValueError, match="d_hidden must be a multiple of the 5 shards"):
        FusedExperts(2, D, H, num_shards=5)
    with pytest.raises(ValueError, match=r"size must be a divisor of the 1 ranks .* got 2"):
        FMoETransformerMLP(2, D, H, expert_tensor_parallel_size=2)
    assert FMoETransformerMLP(2, D, H, expert_tensor_parallel_size=1).tot_expert == 2
