"""Fixtures of the tests that train: a small text, and train_lm.py run in this process."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A small folder of text: a few modules of the standard library, one that is no text, one that is hidden."""
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("ast", "argparse", "os", "shutil", "textwrap", "typing", "inspect", "tarfile"):
        shutil.copy(library / f"{name}.py", folder)
    (folder / "latin1.py").write_bytes("# \xe9\xe8".encode("latin-1"))
    (folder / "binary.dat").write_bytes(b"a\0b")
    (folder / ".hidden").write_text("secret")
    return folder


@pytest.fixture
def quick(text, tmp_path, capsys):
    """Run in this process: the options of --quick on the small text; returns exit code, stdout and stderr.

    The dense model is left out, unless ``compare`` asks for it.
    """
    import train_lm  # late: some tests of this folder do without its packages

    def run(
        *options: str, out: Path = tmp_path / "out", compare: bool = False
    ) -> tuple[int, str, str]:
        arguments = [
            "--quick",
            "--eager",
            "--device",
            "cpu",
            "--text",
            str(text),
            "--out",
            str(out),
            *options,
            *([] if compare or "--dense" in options else ["--no-compare"]),
        ]
        capsys.readouterr()
        code = train_lm.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
