"""Build a wheel and an sdist, install them in every way pip knows, and use each installation from elsewhere.

    python scripts/check_dist.py

Run it with the Python of an environment that has torch, the build tools and an editable installation of moeops (``make
dist-check`` does). The other installations are made from a copy of the source tree, in environments of their own; they
are CPU only, for speed.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

import command as command_line

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "runs", "__pycache__", ".*_cache", "*.so", "*.egg-info"
)
USE = """
import torch, moeops
weights, ids = moeops.topk_route(torch.randn(5, 4), 2)
plan = moeops.sort_tokens(ids, 4)
x = torch.randn(5, 8, requires_grad=True)
y = moeops.unpermute_tokens(moeops.permute_tokens(x, plan), plan, weights)
torch.testing.assert_close(y, x)
y.sum().backward()
from moeops.layers import FMoETransformerMLP
layer = FMoETransformerMLP(4, 8, 16, activation="swiglu")
layer(x).sum().backward()
print(moeops.__file__)
"""


def main() -> int:
    """Exit code 1 at the first installation that does not work."""
    with tempfile.TemporaryDirectory(prefix="moeops-dist-") as name:
        folder = Path(name)
        source = folder / "source"
        shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
        sdist = build_sdist(source, folder / "dist")
        wheel = build_wheel(sdist, folder / "dist")
        check_contents(sdist, wheel)
        check("wheel", folder, [str(wheel)], source)
        check("pip install . (isolated build)", folder, ["."], source)
        check_use("pip install -e .", sys.executable, folder)
    print("check_dist: sdist, wheel, pip install and editable install work")
    return 0


def run(command: list[str], cwd: Path) -> str:
    """Output of a command, without CUDA."""
    return command_line.run("check_dist", command, cwd, SKBUILD_CMAKE_DEFINE="MOEOPS_CUDA=OFF")


def build_sdist(source: Path, dist: Path) -> Path:
    """Build the sdist through the standard build hook."""
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run([sys.executable, "-c", code, str(dist)], source)
    (sdist,) = dist.glob("*.tar.gz")
    return sdist


def build_wheel(sdist: Path, dist: Path) -> Path:
    """Build the wheel from the sdist, so that the sdist is complete."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(dist),
    ]
    run([*pip, str(sdist)], dist)
    (wheel,) = dist.glob("*.whl")
    return wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """What must be in the archives, and what must not."""
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[-1] for name in archive.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    wanted = {
        sdist: (
            {
                "CMakeLists.txt",
                "LICENSE",
                "README.md",
                "moeops/csrc/schema.cpp",
                "tests/test_info.py",
            },
            in_sdist,
        ),
        wheel: ({"moeops/libmoeops_cpu.so", f"moeops/_C{suffix}", "moeops/__main__.py"}, in_wheel),
    }
    for archive, (names, found) in wanted.items():
        if names - found:
            sys.exit(
                f"check_dist: {archive.name} must hold {sorted(names - found)}, got {sorted(found)}"
            )
    if not any(name.endswith("licenses/LICENSE") for name in in_wheel):
        sys.exit(f"check_dist: {wheel.name} must hold its license, got {sorted(in_wheel)}")
    strays = [
        n for n in in_wheel if "csrc" in n or n.startswith(("tests", "examples", "benchmarks"))
    ]
    strays += [
        n for n in in_sdist if n.endswith((".so", ".o")) or n.startswith((".git/", "build/"))
    ]
    if strays:
        sys.exit(f"check_dist: the archives must hold no {sorted(strays)}")


def check(title: str, folder: Path, arguments: list[str], source: Path) -> None:
    """Install in a fresh environment, use the package, and remove it."""
    environment = Path(tempfile.mkdtemp(dir=folder))
    python = make_environment(environment)
    run([python, "-m", "pip", "install", "--no-deps", *arguments], source)
    check_use(title, python, environment)
    run([python, "-m", "pip", "uninstall", "-y", "moeops"], folder)


def check_use(title: str, python: str, folder: Path) -> None:
    """Use the package that an interpreter finds from an empty folder."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    where = run([python, "-c", USE], elsewhere).strip().splitlines()[-1]
    run([python, "-m", "moeops", "info"], elsewhere)
    print(f"check_dist: {title}: {where}", flush=True)


def make_environment(folder: Path) -> str:
    """An environment that shares every package of this one but moeops, by links: torch is not copied."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "moeops" not in package.name.lower() and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    return str(folder / "bin" / "python")


if __name__ == "__main__":
    sys.exit(main())
