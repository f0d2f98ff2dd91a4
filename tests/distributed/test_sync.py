"""Gradients and state dicts in groups of 2 and 4 processes; the checks are in the modules that ``CHECKS`` names."""

from __future__ import annotations

import pytest

from processes import run_checks

CHECKS = "sync_checks tag_checks state_checks"

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo(world_size, tmp_path):
    run_checks(CHECKS, world_size, "gloo", tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks(CHECKS, world_size, "nccl", tmp_path)
