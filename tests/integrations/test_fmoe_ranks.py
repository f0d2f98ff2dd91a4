"""Programs written for FastMoE on several processes; the checks are in fmoe_checks.py and fmoe_grid_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo(world_size, tmp_path):
    run_checks("fmoe_checks fmoe_grid_checks", world_size, "gloo", tmp_path)


def test_eight_ranks(tmp_path):
    run_checks("fmoe_grid_checks", 8, "gloo", tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks("fmoe_checks fmoe_grid_checks", world_size, "nccl", tmp_path)
