"""Rows and counts between 2 and 4 processes; the checks are in exchange_checks.py and hierarchy_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo(world_size, tmp_path):
    run_checks("exchange_checks hierarchy_checks", world_size, "gloo", tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks("exchange_checks hierarchy_checks", world_size, "nccl", tmp_path)
