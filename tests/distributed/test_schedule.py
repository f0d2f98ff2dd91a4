"""Schedules of expert-parallel layers on 2 and 4 processes; the checks themselves are in schedule_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


def test_gloo(tmp_path):
    run_checks("schedule_checks timeline_checks", 2, "gloo", tmp_path, seconds=200)


@pytest.mark.cuda
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks("schedule_checks", world_size, "nccl", tmp_path, seconds=200)
