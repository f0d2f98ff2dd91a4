"""Run the op tests on a CPU library that AddressSanitizer and UndefinedBehaviorSanitizer watch, and look for leaks.

    python scripts/sanitize_cpu.py [options for pytest]

Run it with the Python of an environment that has torch, the build tools and pytest (``make sanitize`` does). The
library, an environment that finds it in the place of an installed one, and reports lie in ``build/sanitize``; GCC is
needed. The first finding ends the process that met it, and the test that it ran fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
SITE = FOLDER / "site"
# Options of both sanitizers, and a bound of memory for freed blocks that a use after free is looked for in.
ASAN = "halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=1:quarantine_size_mb=64"
UBSAN = "halt_on_error=1:abort_on_error=1:print_stacktrace=1"
# What must end this process: one byte written behind the memory of a tensor.
OVERFLOW = """
import ctypes, torch
x = torch.zeros(5, dtype=torch.uint8)
ctypes.memset(x.data_ptr(), 1, 6)
"""
# The library in use is the watched one, whatever else is installed.
IN_USE = """
from pathlib import Path
import moeops._extension
path = moeops._extension.loaded_libraries()["libmoeops_cpu.so"]
data = path.read_bytes()
assert b"__asan_report_load" in data and b"__ubsan_handle_" in data, path
print(path)
"""


def main(options: list[str]) -> int:
    """Exit code 1 where a test fails, the sanitizers see nothing, or an op leaks."""
    begin = time.monotonic()
    build()
    python = make_environment()
    print(f"sanitize_cpu: built in {time.monotonic() - begin:.0f} s", flush=True)
    environment = {
        **os.environ,
        # libstdc++ too, because AddressSanitizer looks for its functions before torch loads it.
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": f"{ASAN}:detect_leaks=0",
        "UBSAN_OPTIONS": UBSAN,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Inductor's products must not meet those of a process that nothing watches.
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
    }
    environment.pop("PYTHONPATH", None)
    check_sanitizers(python, environment)

    def run(*command: str, **more: str) -> None:
        # Not in the source tree, whose moeops would come first.
        subprocess.run([python, *command], cwd=FOLDER, env={**environment, **more}, check=True)

    begin = time.monotonic()
    try:
        run("-m", "pytest", str(ROOT / "tests" / "ops"), "-p", "no:cacheprovider", *options)
        run(
            str(ROOT / "scripts" / "find_leaks.py"),
            # Freed memory counts as freed at once, and Python asks malloc for all of its own.
            ASAN_OPTIONS=f"{ASAN}:detect_leaks=0:quarantine_size_mb=0:thread_local_quarantine_size_kb=0",
            PYTHONMALLOC="malloc",
        )
    except subprocess.CalledProcessError as err:
        print(f"sanitize_cpu: {err}", file=sys.stderr)
        return 1
    print(f"sanitize_cpu: no finding in {time.monotonic() - begin:.0f} s")
    return 0


def build() -> None:
    """Compile the libraries and put them beside the Python files."""
    cmake = FOLDER / "cmake"
    subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(cmake), "-G", "Ninja"),
            *("-DMOEOPS_CUDA=OFF", "-DMOEOPS_SANITIZE=ON", f"-DPython_EXECUTABLE={sys.executable}"),
            f"-Dpybind11_DIR={pybind11_folder()}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["cmake", "--build", str(cmake)], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(SITE, ignore_errors=True)
    ignored = shutil.ignore_patterns("csrc", "__pycache__", "*.so")
    shutil.copytree(ROOT / "moeops", SITE / "moeops", ignore=ignored)
    for file in cmake.glob("*.so"):
        shutil.copy(file, SITE / "moeops")


def pybind11_folder() -> str:
    """Where pybind11's CMake files are."""
    command = [sys.executable, "-m", "pybind11", "--cmakedir"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def make_environment() -> str:
    """A Python that has the packages of this one, but for an installed moeops."""
    folder = FOLDER / "venv"
    venv.create(folder, clear=True)
    python = folder / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # Folders that a .pth file names have their own .pth files ignored, and so the finder of an editable install.
    packages = [SITE, *dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))]
    Path(paths["purelib"], "watched.pth").write_text("".join(f"{path}\n" for path in packages))
    return str(python)


def library(name: str) -> str:
    """A library of the compiler that built moeops."""
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if not os.path.isabs(path):
        sys.exit(
            f"sanitize_cpu: the compiler must have {name}, got none from {compiler[0]}. Install GCC's sanitizers and "
            "set CXX to g++."
        )
    return path


def check_sanitizers(python: str, environment: dict[str, str]) -> None:
    """A fault is found, and the library in use is watched: otherwise no finding would mean nothing."""
    options = {"cwd": FOLDER, "env": environment, "capture_output": True, "text": True}
    fault = subprocess.run([python, "-c", OVERFLOW], **options)
    if "heap-buffer-overflow" not in fault.stderr or fault.returncode == 0:
        sys.exit(f"sanitize_cpu: a write behind a tensor must be found, got:\n{fault.stderr}")
    used = subprocess.run([python, "-c", IN_USE], **options)
    if used.returncode or not used.stdout.startswith(str(SITE)):
        sys.exit(
            f"sanitize_cpu: moeops must come from {SITE}, got {used.stdout.strip()}\n{used.stderr}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
