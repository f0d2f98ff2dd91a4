"""Gates on 2 processes, which ask each other for their counts; the checks themselves are in across_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


def test_gloo(tmp_path):
    run_checks("across_checks", 2, "gloo", tmp_path)


@pytest.mark.cuda
def test_nccl(tmp_path, cuda_device):
    run_checks("across_checks", 2, "nccl", tmp_path)
