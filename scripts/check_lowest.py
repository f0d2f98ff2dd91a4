"""Run tests with the oldest versions of all packages that ``pyproject.toml`` allows.

    python scripts/check_lowest.py [--python PYTHON] [options and files for pytest]

Run it with Python 3.11 or later that has ``packaging`` (``make lowest`` does). It makes an environment of ``--python``,
by default the oldest that moeops is for, in ``build/lowest``, with each bound ``>=`` of the dependencies, the build and
the extras as ``==``, compiles moeops there, and runs the tests on that installation; where no files are given, those of
FOLDERS. pip fails where a bound names a version that does not exist, or one that does not go with the others.
Requirements that are exact are those of linters and of the site, and left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "lowest"
FOLDERS = ("ops", "gates", "layers", "distributed", "numba", "integrations")


def main() -> int:
    """Exit code of pytest; that of the command that failed before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parser.add_argument("--python", default=oldest_python(project), help="[%(default)s]")
    options, arguments = parser.parse_known_args()
    python = make_environment(options.python, lowest_versions(project))
    if not any(Path(argument.split("::")[0]).exists() for argument in arguments):
        arguments += [str(ROOT / "tests" / name) for name in FOLDERS]
    arguments = [str(Path(a).resolve()) if Path(a).exists() else a for a in arguments]
    # Not in the source tree, whose moeops would come first.
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=FOLDER, env=environment()).returncode


def oldest_python(project: dict[str, Any]) -> str:
    """The interpreter of ``requires-python``, such as python3.10."""
    return "python" + project["project"]["requires-python"].removeprefix(">=")


def lowest_versions(project: dict[str, Any]) -> list[str]:
    """``name==version`` for each requirement with a lower bound, torch first.

    Raises:
        ValueError: a requirement has no lower bound and is not exact.
    """
    extras = project["project"]["optional-dependencies"].values()
    texts = [
        *project["project"]["dependencies"],
        *project["build-system"]["requires"],
        *(text for extra in extras for text in extra),
    ]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, texts):
        bounds = {spec.operator: spec.version for spec in requirement.specifier}
        if "==" in bounds:
            continue
        if ">=" not in bounds:
            raise ValueError(
                f"pyproject.toml: {requirement.name} must have a lower bound, got {requirement}."
            )
        known = found.setdefault(requirement.name, requirement)
        known.extras |= requirement.extras
        if Version(bounds[">="]) > lower_bound(known):  # all extras together need the highest
            known.specifier = requirement.specifier
    return [f"{with_extras(known)}=={lower_bound(known)}" for known in found.values()]


def lower_bound(requirement: Requirement) -> Version:
    """The version behind ``>=``."""
    return next(Version(s.version) for s in requirement.specifier if s.operator == ">=")


def with_extras(requirement: Requirement) -> str:
    """Name and extras, such as ``numba-cuda[cu13]``."""
    extras = ",".join(sorted(requirement.extras))
    return requirement.name + (f"[{extras}]" if extras else "")


def environment() -> dict[str, str]:
    """Variables of this process, with the environment's programs first and without what leads to other packages."""
    path = f"{FOLDER / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def make_environment(python: str, wanted: list[str]) -> str:
    """An environment with the ``wanted`` packages and moeops compiled for them; the Python in it."""
    venv = FOLDER / "venv"
    stamp = FOLDER / "requirements.txt"
    lines = "\n".join([f"# {python}", *wanted, ""])

    def run(*command: str) -> None:
        print(f"check_lowest: {' '.join(command)}", flush=True)
        code = subprocess.run(command, cwd=ROOT, env=environment()).returncode
        if code:
            sys.exit(code)

    inside = str(venv / "bin" / "python")
    pip = (inside, "-m", "pip", "install", "--quiet")
    if not stamp.is_file() or stamp.read_text() != lines:
        stamp.unlink(missing_ok=True)
        run(python, "-m", "venv", "--clear", str(venv))
        run(*pip, "--upgrade", "pip>=24")
        run(*pip, *wanted)
        stamp.write_text(lines)
    build = ("-C", f"build-dir={FOLDER / 'cmake'}", "-C", "cmake.define.MOEOPS_CUDA=OFF")
    run(*pip, "--no-build-isolation", "--no-deps", *build, ".")
    run(*pip[:3], "list")
    return inside


if __name__ == "__main__":
    sys.exit(main())
