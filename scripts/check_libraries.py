"""Check the built op libraries: only the stable ABI of torch, and every CUDA source for every architecture.

    python scripts/check_libraries.py [--cuda]

Reads the libraries of the installed moeops without loading them, and the compiler commands of its last build.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the libraries may ask for: torch's C shims, and versioned symbols of the system's own libraries.
TORCH_SHIM = re.compile(r"(aoti_torch|torch)_\w+")
SYSTEM = re.compile(r"\w+@{1,2}(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP|LIBMVEC)_\S+")
TOOLCHAIN = {
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "__cxa_finalize",
}
# Shims that came after torch 2.11, the oldest torch that the libraries must load into.
TOO_NEW = {"torch_new_stable_ivalue", "torch_get_current_stream_native_handle"}
NEEDED_LIBRARY = re.compile(
    r"lib(torch|m|c|stdc\+\+|gcc_s|gomp|dl|rt|pthread)\.so(\.\d+)?|ld-linux.*"
)
# What "80;90a-real" in CMakeLists.txt must turn into: two kinds of machine code, and PTX for what comes later.
ARCHITECTURES = {"sm_80": "code=[compute_80,sm_80]", "sm_90a": "code=[sm_90a]"}
# Kernels for one architecture, but for the host code around them that every build has.
HOPPER = ROOT / "moeops/csrc/cuda/hopper"
HOPPER_EVERYWHERE = {"absent.cu", "expert_block.cu", "refusals.cu"}


def main() -> int:
    """Print one line per problem; exit code 1 if there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cuda", action="store_true", help="the CUDA library must be there too")
    options = parser.parse_args()

    folder = library_folder()
    names = ["libmoeops_cpu.so"] + ["libmoeops_cuda.so"] * options.cuda
    problems = []
    for name in names:
        library = folder / name
        if library.is_file():
            found, count = check_symbols(library)
            problems += found
            print(
                f"{name}: {count} undefined symbols, {len(found)} of them or of its needs not allowed"
            )
        else:
            problems.append(f"{name}: must be in {folder}, got nothing there. Build moeops first.")
    if options.cuda:
        problems += check_cuda_commands()
    for problem in problems:
        print(f"check_libraries: {problem}", file=sys.stderr)
    return 1 if problems else 0


def library_folder() -> Path:
    """Where the installed moeops keeps its libraries."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    package = importlib.util.find_spec("moeops")
    extension = importlib.util.find_spec("moeops._C") if package else None
    if extension is None or extension.origin is None:
        sys.exit("check_libraries: moeops must be installed. Run: make build")
    return Path(extension.origin).parent


def run(*command: str) -> str:
    """Output of a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def not_allowed(symbols: list[str]) -> list[str]:
    """The undefined symbols that tie a library to one build of torch, or to Python."""
    return [
        symbol
        for symbol in symbols
        if symbol in TOO_NEW
        or not (TORCH_SHIM.fullmatch(symbol) or SYSTEM.fullmatch(symbol) or symbol in TOOLCHAIN)
    ]


def check_symbols(library: Path) -> tuple[list[str], int]:
    """Symbols and libraries that ``library`` asks for but must not; and how many symbols it asks for."""
    symbols = [
        line.split()[-1] for line in run("nm", "-D", "--undefined-only", str(library)).splitlines()
    ]
    problems = [
        f"{library.name}: must use torch's stable ABI only, got {run('c++filt', symbol).strip()}"
        for symbol in not_allowed(symbols)
    ]
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", "--wide", str(library)))
    if "libtorch.so" not in needed:
        problems.append(f"{library.name}: must need libtorch.so, got {needed}. It will not load.")
    for name in needed:
        if not NEEDED_LIBRARY.fullmatch(name):
            problems.append(f"{library.name}: must not need {name}.")
    return problems, len(symbols)


def check_cuda_commands() -> list[str]:
    """CUDA sources that the last build did not compile for every architecture."""
    databases = sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda p: p.stat().st_mtime)
    if not databases:
        return ["build/*/compile_commands.json must exist. Run: make cuda-check"]
    entries = json.loads(databases[-1].read_text(encoding="utf-8"))
    commands = {Path(entry["file"]).resolve(): entry["command"] for entry in entries}
    sources = sorted((ROOT / "moeops/csrc/cuda").rglob("*.cu"))
    problems = []
    for source in sources:
        command = commands.get(source)
        name = source.relative_to(ROOT)
        if command is None:
            problems.append(f"{name}: must be in CMakeLists.txt, got no compiler command for it")
            continue
        only_hopper = source.parent == HOPPER and source.name not in HOPPER_EVERYWHERE
        problems += [
            f"{name}: must be compiled for {architecture}, got: {command}"
            for architecture, flag in ARCHITECTURES.items()
            if flag not in command and not (only_hopper and architecture != "sm_90a")
        ]
    print(
        f"{len(sources)} CUDA sources for {', '.join(ARCHITECTURES)} and PTX: {len(problems)} problems"
    )
    return problems if sources else ["moeops/csrc/cuda must hold CUDA sources, got none"]


if __name__ == "__main__":
    sys.exit(main())
