"""Overlap of exchanges, sums of gradients and experts: see overlap_checks.py and slice_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


def test_timed_links(tmp_path):
    run_checks("overlap_checks slice_checks", 2, "gloo", tmp_path)
