"""What the site is built from: a place for every page, and numbers that are those of the page of benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_page_has_a_place_in_the_navigation_of_the_site():
    pages = re.findall(
        r"^ +- (?:[\w ]+: )?(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    assert len(pages) == len(set(pages))
    # README is the site's start, so docs/index.md is called contents.md there.
    own = {"index", "contents", "gate_gallery", "benchmark_plots", "contributing", "changelog"}
    docs = {page.stem for page in (ROOT / "docs").glob("*.md")}
    named = {page.removesuffix(".md") for page in pages}
    assert named - docs - own == set()
    assert docs | own == named, "nav of mkdocs.yml must name every page of docs/: add it there"


RECORDED = sorted((ROOT / "docs" / "data").glob("*.json"))


def recorded_rows(record: dict) -> Iterator[tuple[str, list[float]]]:
    """Name of each row, and its numbers in the order and the units of the page's tables."""
    for result in record.get("results", ()):
        lane = result["group"] == "lane"
        times = (
            ("forward", "total", "wall_forward", "wall_total")
            if lane
            else ("infer", "forward", "total")
        )
        for row in result["rows"]:
            name = f"{result['config']} {row['key']}"
            yield name, [row[time]["median"] / 1e3 for time in times if time in row]
            yield (
                name,
                [row[size] / 2**20 for size in ("activation_bytes", "peak_bytes") if size in row],
            )
    for row in record.get("layers", ()):
        times = [row[time]["median"] / 1e3 for time in ("forward", "total")]
        yield f"{row['shape']} {row['label']} {row['mode']}", times
        yield f"{row['label']} memory", [row["peak_bytes"] / 2**20]
        yield (
            f"{row['label']} speed",
            [row[f"speedup_{part}"] for part in ("forward", "total") if f"speedup_{part}" in row],
        )
    for row in record.get("rows", ()):
        yield (
            row["experts"],
            [row[key] for key in ("train_ms", "train_tokens_per_s", "decode_ms", "peak_mb")],
        )


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_a_recorded_run_has_the_numbers_of_the_page(path):
    record = json.loads(path.read_text())
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert set(record) >= {"machine", "command"}
    for commit in re.findall(r"\b[0-9a-f]{7}\b", record["machine"]["commit"]):
        assert f"commit {commit}" in page or f"at {commit}" in page, commit
    lines = [
        [
            float(number)
            for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", line.replace(",", ""))
        ]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    rows = [
        (name, [round(number, 4) for number in numbers]) for name, numbers in recorded_rows(record)
    ]
    assert len(rows) > 4
    for name, numbers in rows:
        spans = (line[start : start + len(numbers)] for line in lines for start in range(len(line)))
        assert any(span == numbers for span in spans), (
            f"{name}: {numbers} stand in no table of the page"
        )


def test_the_readme_compares_with_numbers_of_the_page():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    row = r"^\| [^|]+ \| ([\d.,]+) (ms|tokens/s) \| ([\d.,]+) \2, [^|]+ \| ([\d.]+) \| ([A-Z]) \|$"
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(row, readme, re.MULTILINE)
    assert len(rows) == 10
    for ours, unit, other, times, command in rows:
        for number in (ours, other):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.,]*\d)", page), number
        ours, other = (float(number.replace(",", "")) for number in (ours, other))
        ratio = other / ours if unit == "ms" else ours / other
        assert f"{ratio:.{len(times.partition('.')[2])}f}" == times, (ours, other)
        assert re.search(rf"^\| {command} \| `python -m benchmarks", readme, re.MULTILINE)
