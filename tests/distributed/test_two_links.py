"""Regions whose chunks pass links inside nodes and between them, on 4 processes; see the modules of checks."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


def test_gloo(tmp_path):
    run_checks("two_link_checks", 4, "gloo", tmp_path)


def test_timed_links(tmp_path):
    run_checks("two_link_timed_checks", 4, "gloo", tmp_path)


@pytest.mark.cuda
def test_nccl(tmp_path, cuda_device):
    run_checks("two_link_checks", 4, "nccl", tmp_path)
