from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "strict_ptxas.py"

QUIET = """ptxas info    : Compiling entry function '_Zgood' for 'sm_90a'
ptxas info    : Function properties for _Zgood
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
SPILLED = QUIET.replace("_Zgood", "_Zbad").replace("0 bytes spill stores", "8 bytes spill stores")
SERIALISED = "ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized in '_Zslow'\n"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("strict_ptxas", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finds_what_ptxas_only_informs_of(script):
    assert script.complaints(QUIET) == []
    assert script.complaints(QUIET + SPILLED) == ["_Zbad spills 8 bytes, 0 are allowed"]
    (serialised,) = script.complaints(QUIET + SERIALISED)
    assert serialised.startswith("(C7510)")
    assert "_Zslow" in serialised


def test_an_allowance_is_for_the_kernel_it_names(script, monkeypatch):
    monkeypatch.setattr(script, "ALLOWED_SPILLS", {"bad": 8})
    assert script.complaints(SPILLED) == []
    assert script.complaints(SPILLED.replace("8 bytes", "12 bytes")) != []
    assert script.complaints(SPILLED.replace("_Zbad", "_Zworse")) != []


@pytest.mark.parametrize(
    ("log", "code", "want"), [(QUIET, 0, 0), (QUIET, 3, 3), (SPILLED, 0, 1), (SPILLED, 3, 3)]
)
def test_exit_code(script, log, code, want, capfd):
    assert (
        script.main([sys.executable, "-c", f"import sys; print({log!r}); sys.exit({code})"]) == want
    )
    assert ("strict_ptxas" in capfd.readouterr().err) == (log is SPILLED)
