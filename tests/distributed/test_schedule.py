"""Schedules of expert-parallel layers on 2 processes; the checks themselves are in schedule_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


def test_gloo(tmp_path):
    run_checks("schedule_checks", 2, "gloo", tmp_path, seconds=200)


@pytest.mark.cuda
def test_nccl(tmp_path, cuda_device):
    run_checks("schedule_checks", 2, "nccl", tmp_path, seconds=200)
