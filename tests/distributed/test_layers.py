"""Expert-parallel layers on 2 and 4 processes; the checks are in layer_, static_, gather_ and hook_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("world_size", [2, 4])
def test_gloo(world_size, tmp_path):
    run_checks("layer_checks static_checks gather_checks hook_checks", world_size, "gloo", tmp_path)


@pytest.mark.cuda
def test_nccl(tmp_path, cuda_device):
    run_checks("layer_checks static_checks gather_checks hook_checks", 2, "nccl", tmp_path)
