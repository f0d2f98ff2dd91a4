"""DistributedDataParallel with local experts on 1 and 2 processes; the checks themselves are in ddp_checks.py."""

from __future__ import annotations

import pytest
import torch

from processes import run_checks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [1, 2])
def test_gloo(world_size, tmp_path):
    run_checks("ddp_checks", world_size, "gloo", tmp_path)


@pytest.mark.cuda
def test_nccl(tmp_path, cuda_device):
    run_checks("ddp_checks", min(2, torch.cuda.device_count()), "nccl", tmp_path)
