"""The launcher of test processes: one failure does not hide another, and errors show values."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from processes import run_checks

pytestmark = pytest.mark.distributed

# This module is also the module of checks that the processes import.
SECONDS = 60


def check_fails_on_one_rank(ranks):
    number = 41 + ranks.rank
    if ranks.rank == 0:
        assert number == 0
    dist.barrier()  # rank 1 waits here for a rank that has ended


def check_passes_afterwards(ranks):
    dist.barrier()


def check_fails_everywhere(ranks):
    text = "what it got"
    raise ValueError(text.upper())


def check_passes_last(ranks):
    dist.barrier()


def test_every_failure_is_reported(tmp_path):
    with pytest.raises(pytest.fail.Exception) as caught:
        run_checks("test_processes", 2, "gloo", tmp_path, SECONDS)
    text = str(caught.value)
    assert "rank 0 in check_fails_on_one_rank" in text
    assert "number = 41" in text
    assert "rank 0 in check_fails_everywhere" in text
    assert "rank 1 in check_fails_everywhere" in text
    assert "ValueError: WHAT IT GOT" in text
    assert "check_passes" not in text


def test_a_module_without_checks_fails(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="tolerances has no checks"):
        run_checks("tolerances", 1, "gloo", tmp_path, SECONDS)
