"""Overlap of exchanges, sums of gradients and experts, and what rows are on the wires: see the modules of checks."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


def test_timed_links(tmp_path):
    run_checks("overlap_checks slice_checks codec_checks", 2, "gloo", tmp_path, seconds=600)
