"""The package ``fmoe`` for tests of programs written for FastMoE."""

from __future__ import annotations

import pytest


@pytest.fixture
def fmoe():
    """``import fmoe`` as a program does it, undone afterwards."""
    from fmoe_cases import imported  # late: other tests of this folder want no fmoe

    with imported() as package:
        yield package
