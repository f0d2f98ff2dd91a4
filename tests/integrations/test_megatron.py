"""moeops in Megatron-Core on 1 and 2 processes; the checks are in the two modules of checks."""

from __future__ import annotations

import importlib.util

import pytest

from processes import run_checks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("megatron", "megatron.core"))),
        reason="megatron-core is not installed",
    ),
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gloo(world_size, tmp_path):
    run_checks("megatron_checks megatron_checkpoint_checks", world_size, "gloo", tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [1, 2])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks("megatron_checks megatron_checkpoint_checks", world_size, "nccl", tmp_path)
