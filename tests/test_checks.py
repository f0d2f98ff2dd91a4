"""What all packages check with: the switch for checks of values."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeops
from moeops._checks import debug_checks


@pytest.mark.parametrize("value", ["1", "true", "True", "TRUE", "yes", "Yes", "on", "ON", "2"])
def test_debug_checks_are_on(value, monkeypatch):
    monkeypatch.setenv("MOEOPS_DEBUG_CHECKS", value)
    assert debug_checks()


@pytest.mark.parametrize("value", [None, "", "0", "false", "False", "no", "NO", "off", "Off"])
def test_debug_checks_are_off(value, monkeypatch):
    monkeypatch.delenv("MOEOPS_DEBUG_CHECKS", raising=False)
    if value is not None:
        monkeypatch.setenv("MOEOPS_DEBUG_CHECKS", value)
    assert not debug_checks()


def test_the_switch_is_read_in_one_place_of_python():
    folder = Path(moeops.__file__).parent
    readers = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if '"MOEOPS_DEBUG_CHECKS' in path.read_text()
    }
    assert readers == {"_checks.py"}
