"""Exchanges by peer memory on 2 and 4 processes, and the shapes of their ops; the checks are in peer_checks.py."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moeops  # noqa: F401  (registers the ops)
from processes import run_checks


@pytest.mark.distributed
def test_gloo(tmp_path):
    run_checks("peer_checks", 2, "gloo", tmp_path)


@pytest.mark.cuda
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_nccl(world_size, tmp_path, cuda_device):
    run_checks("peer_checks", world_size, "nccl", tmp_path)


def test_shapes():
    ops = torch.ops.moeops
    with FakeTensorMode():
        x = torch.empty(6, 3, 2, dtype=torch.bfloat16)
        for op, rows in ((ops.peer_all_gather, 18), (ops.peer_reduce_scatter, 2)):
            y = op(x, 3, "0")
            assert (y.shape, y.dtype) == ((rows, 3, 2), torch.bfloat16)


@pytest.mark.parametrize("op", ["peer_all_gather", "peer_reduce_scatter"])
def test_rows_on_the_cpu_are_refused(op):
    with pytest.raises(ValueError, match=f"{op}: rows must be on a CUDA device, got cpu"):
        getattr(torch.ops.moeops, op)(torch.ones(2, 3), 2, "0")
