"""Pages name files and functions that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PLACES = ("", "moeops", "moeops/csrc/cuda", "moeops/distributed/checkpoint", "docs")
_FILE = r"`((?:[\w.]+/)*\w+\.(?:py|cpp|cu|cuh|h))`"


def find(name: str) -> Path | None:
    return next((ROOT / place / name for place in PLACES if (ROOT / place / name).exists()), None)


def test_the_architecture_names_files_and_functions_that_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = [name for name in re.findall(_FILE, text) if "foo." not in name]
    assert len(files) > 40
    assert [name for name in files if find(name) is None] == []
    # A function or class beside its file: `layers/moe.py` `forward`, `_forward`.
    for name, names in re.findall(_FILE + r"((?:,? `\w[\w.]*`)+)", text):
        source = find(name).read_text()
        for function in re.findall(r"`([\w.]+)`", names):
            found = re.search(rf"(?:def|class) {function.rpartition('.')[2]}\b", source)
            if function.endswith((".py", ".cpp", ".cu")):
                continue
            assert found, f"{name} {function}"
    # A private one anywhere on the page.
    code = "\n".join(source.read_text() for source in (ROOT / "moeops").rglob("*.py"))
    private = set(re.findall(r"`(_\w+)`", text))
    assert len(private) > 10
    assert [name for name in private if not re.search(rf"(?:def|class) {name}\b", code)] == []


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for name, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if "://" in name:
            continue
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_every_page_is_in_the_index_and_begins_with_a_sentence():
    """A reader finds every page, and its first lines say what it is good for."""
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
        title, empty, first, *_ = page.read_text().splitlines()
        assert title.startswith("# "), page.name
        assert (empty, bool(re.match(r"[\w`]", first))) == ("", True), page.name
