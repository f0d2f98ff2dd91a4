"""The table of Hopper tiles, which runs on the host: its choice for published models, and its override."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# By D, H and rows per expert, for up, down, dh, dx, dw_up and dw_down: among the best of benchmarks.tiles on an H100,
# of dh on an H200.
CHOICES = {
    (
        2048,
        768,
        2048,
    ): "p192x2:small:skip p192:large:whole p192:small:skip c256x2:small:skip p192:8 p192:8",
    (
        4096,
        14336,
        2048,
    ): "p192x2:small:skip c256x2:small:skip p192:small:skip c256x2:small:skip p192x2:16 p192x2:16",
    (
        4096,
        2048,
        1536,
    ): "p192x2:small:skip p192:large:whole p192:small:skip c256x2:small:skip p192x2:16 p192x2:16",
    (
        2048,
        256,
        2048,
    ): "c256:small:whole p192:large:skip p128:small:skip p192:small:skip p192:8 c256:16",
    (
        2048,
        768,
        32,
    ): "p192x2:small:skip p192:small:skip p192:small:skip p192:small:skip p192:8 p192:8",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("a C++ compiler is not installed")
    built = tmp_path_factory.mktemp("tiles") / "tiles"
    libtorch = Path(torch.__file__).parent
    csrc = ROOT / "moeops" / "csrc"
    subprocess.run(
        [
            *compiler.split(),
            *("-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
            *(f"-I{csrc}", f"-I{csrc / 'cuda'}", "-isystem", libtorch / "include"),
            *(ROOT / "tests" / "csrc" / "tiles.cpp", "-x", "c++", csrc / "cuda/hopper/tiles.cu"),
            *("-x", "none", "-o", built, f"-L{libtorch / 'lib'}", "-Wl,--no-as-needed"),
            *("-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libtorch / 'lib'}"),
        ],
        check=True,
    )

    def run(product, n, k, rows, tiles: str | None = None, memory=4.9, unit="swiglu"):
        environment = {name: v for name, v in os.environ.items() if name != "MOEOPS_TILES"}
        if tiles is not None:
            environment["MOEOPS_TILES"] = tiles
        command = [str(built), product, *map(str, (n, k, rows, memory)), unit]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("size", CHOICES, ids=str)
def test_choices(program, size):
    D, H, rows = size
    products = {
        "up": (2 * H, D),
        "down": (D, H),
        "dh": (H, D),
        "dx": (D, 2 * H),
        "dw_up": (2 * H, D),
        "dw_down": (D, H),
    }
    got = [program(name, n, k, rows).stdout.strip() for name, (n, k) in products.items()]
    assert got == CHOICES[size].split()


@pytest.mark.parametrize(
    ("D", "H", "rows", "slow", "fast"),
    [
        (4096, 1536, 1024, "p192x2", "p192"),
        (4096, 1536, 128, "p192", "p192"),
        (2048, 1536, 2048, "p192", "p192"),  # a short reduction
        (4096, 2048, 1536, "p192", "p192"),  # an odd number of tiles
        (2048, 1024, 4096, "p192x2", "p128"),
        (2048, 512, 1024, "p128", "p128"),
    ],
)
def test_the_memory_of_the_device(program, D, H, rows, slow, fast):
    """What an H100 and an H200 share and do not."""
    for memory, tile in ((3.35, slow), (4.9, fast)):
        run = program("dh", H, D, rows, memory=memory)
        assert run.stdout.strip() == f"{tile}:small:skip"


@pytest.mark.parametrize(
    ("unit", "H", "slow", "fast"),
    [
        ("plain", 1536, "p192x2", "p192x2"),
        ("plain", 256, "p192x2", "p192x2"),
        ("glu", 1536, "p192", "p192"),
        ("glu", 256, "p128", "p128"),
    ],
)
def test_other_units_in_the_backward(program, unit, H, slow, fast):
    for memory, tile in ((3.35, slow), (4.9, fast)):
        run = program("dh", H, 4096, 1024, memory=memory, unit=unit)
        assert run.stdout.strip() == f"{tile}:small:skip"


@pytest.mark.parametrize(
    ("product", "tile"),
    [("up", "c256x2:large:whole"), ("dx", "p192:small:skip"), ("dw_up", "c256:3")],
)
def test_override(program, product, tile):
    other = "down=p128:small:whole,dw_down=p192:1"
    assert program(product, 512, 512, 512, f"{other},{product}={tile}").stdout.strip() == tile


@pytest.mark.parametrize(
    ("tiles", "text"),
    [
        ("up=p192:big:skip", r"must give up as p192"),
        ("up=p192:small:part", r"must give up as p192"),
        ("up=p256:small:skip", r"must give up as p192"),
        ("up=p192:small", r"must give up as p192"),
        ("upp=p192:small:skip", r"must name up, down, dh, dx, dw_up or dw_down"),
        ("up", r"must name up, down, dh, dx, dw_up or dw_down"),
    ],
)
def test_a_wrong_override_is_an_error(program, tiles, text):
    run = program("up", 512, 512, 512, tiles)
    assert run.returncode == 1
    assert f"MOEOPS_TILES {text}" in run.stdout
    assert f"got '{tiles}'" in run.stdout


@pytest.mark.parametrize("tiles", ["dw_up=p192:0", "dw_up=p192:x", "dw_up=p192", "dw_up=p128:8"])
def test_a_wrong_weight_gradient_is_an_error(program, tiles):
    run = program("dw_up", 512, 512, 512, tiles)
    assert run.returncode == 1
    assert "MOEOPS_TILES must give dw_up as p192|p192x2|c256:GROUP" in run.stdout
