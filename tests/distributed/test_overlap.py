"""Overlap of exchanges and experts, seen in wall time; the checks themselves are in overlap_checks.py."""

from __future__ import annotations

import pytest

from processes import run_checks

pytestmark = pytest.mark.distributed


def test_timed_links(tmp_path):
    run_checks("overlap_checks", 2, "gloo", tmp_path)
