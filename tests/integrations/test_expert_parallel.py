"""transformers' expert parallelism between 2 processes; the checks are in expert_parallel_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed
pytest.importorskip("transformers.distributed.expert_parallel")


def test_gloo(tmp_path):
    run_checks("expert_parallel_checks", 2, "gloo", tmp_path)


@pytest.mark.cuda
def test_nccl(tmp_path, cuda_device):
    run_checks("expert_parallel_checks", 2, "nccl", tmp_path)
