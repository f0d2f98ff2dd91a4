"""Build the site from README, docs/ and docstrings into build/site: ``python scripts/site/build.py`` (``make docs``).

Pages are gathered in build/pages: the texts with their links turned to where they lie there, a page per public
module, a picture of each gate's loads from a small run, and plots of the recorded benchmarks. Then MkDocs builds
strictly: a link or an anchor that leads nowhere, a page outside the navigation, or a page that would fetch something
from another machine ends the build with exit code 1. Search needs a server: ``python -m http.server -d build/site``.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import api_pages
import benchmark_plots
import gate_loads
from markdown.extensions.toc import slugify
from mkdocs.commands import build as mkdocs_build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "build" / "pages"
# Pages that are called otherwise on the site: README is its start, so docs/index.md needs another name.
NAMES = {
    "README.md": "index.md",
    "docs/index.md": "contents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(https?:)?//[^>]*>|<link[^>]*\shref=["']?(https?:)?//[^>]*>"""
)
_HEADINGS = re.compile(r"^## (\w+)\(?.*$", re.MULTILINE)


def write(name: str, text: str) -> None:
    """A page of the site."""
    path = PAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def place(source: Path) -> str:
    """Where a file of the repository lies among the pages."""
    name = source.relative_to(ROOT).as_posix()
    return NAMES.get(name, name.removeprefix("docs/"))


def turned(source: Path, text: str) -> str:
    """A text whose links lead to where the pages lie; a link to a file that is no page is for MkDocs to refuse."""

    def turn(found: re.Match) -> str:
        start, target, anchor, end = found.groups()
        if "://" in target:
            return found.group()
        file = (source.parent / target).resolve()
        return f"{start}{place(file)}{anchor or ''}{end}"

    return _LINK.sub(turn, text)


def write_texts() -> None:
    """README, CHANGELOG, CONTRIBUTING and docs/, with its pictures."""
    for source in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        write(place(source), turned(source, source.read_text()))
    shutil.copytree(ROOT / "docs" / "images", PAGES / "images")
    (PAGES / "stylesheets").mkdir()
    shutil.copy(Path(__file__).with_name("site.css"), PAGES / "stylesheets")


def write_gallery() -> None:
    """Every gate with its picture, a word on it, and the ways to its maths and its reference."""
    maths = (ROOT / "docs" / "gate_maths.md").read_text()
    anchors = {
        found.group(1): slugify(found.group().removeprefix("## "), "-")
        for found in _HEADINGS.finditer(maths)
    }
    lines = ["# Gate gallery\n", _about_gallery()]
    for name, loads in gate_loads.draw_all(PAGES / "images" / "gates").items():
        first_line = (getattr(gate_loads.moeops.gates, name).__doc__ or "").partition("\n")[0]
        where = f"gate_maths.md#{anchors[name]}" if name in anchors else "gate_maths.md"
        lines.append(
            f"## {name}\n\n{first_line}\n\n![Choices and loads of {name}](images/gates/{name}.svg)\n\n"
            f"{gate_loads.caption(loads)}. [Maths and options]({where}), [reference][moeops.gates.{name}].\n"
        )
    write("gate_gallery.md", "\n".join(lines))


def _about_gallery() -> str:
    run = gate_loads
    return (
        f"Each gate trains the same layer of {run.EXPERTS} experts for {run.STEPS} steps of {run.TOKENS} tokens, with "
        f"{run.LOSS_SCALE} of its auxiliary loss where it has one. Tokens are of {run.KINDS} kinds, some frequent and "
        "some rare, so that a gate without a loss or a limit loads few experts. Left: the weights of some tokens of "
        "the last step, darker for more; right: how many tokens each expert had. Such a small run shows what a rule "
        "does, not which gate trains best: [the gates compared](gates.md#the-gates-compared). "
        "`python scripts/site/gate_loads.py` draws these pictures on a CPU in seconds.\n"
    )


def write_plots() -> None:
    """The recorded runs of docs/data, each with its machine and its command."""
    lines = ["# Benchmark plots\n", _ABOUT_PLOTS]
    for source in sorted((ROOT / "docs" / "data").glob("*.json")):
        record = benchmark_plots.json.loads(source.read_text())
        lines.append(f"## {benchmark_plots.title(record)}\n")
        for plot, picture in benchmark_plots.draw_all(source, PAGES / "images" / "plots"):
            lines.append(f"![{plot.title}](images/plots/{picture.name})\n")
            lines.append(f"{plot.title}.\n")
        command = " ".join(record["command"])
        lines.append(f"{benchmark_plots.describe(record)}\n\n```\n{command}\n```\n")
    write("benchmark_plots.md", "\n".join(lines))


_ABOUT_PLOTS = (
    "The recorded runs of [benchmarks.md](benchmarks.md), which has all numbers, how they were measured, and the "
    "losses. Rates are formed from its rounded times. Each plot stands above its machine and the command that "
    "measures again; `python scripts/site/benchmark_plots.py runs/benchmark_cuda.json` plots yours.\n"
)


def navigation(nav: list[Any], reference: list[str]) -> list[Any]:
    """The navigation of mkdocs.yml with the pages of the reference in their place."""
    return [
        {"Reference": reference} if isinstance(entry, dict) and "Reference" in entry else entry
        for entry in nav
    ]


def main() -> int:
    """Build; 1 for a site with something wrong in it."""
    argparse.ArgumentParser(prog="build.py", description=__doc__).parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    shutil.rmtree(PAGES, ignore_errors=True)
    write_texts()
    reference = api_pages.pages()
    for page in reference:
        write(page.file, page.text())
    write_gallery()
    write_plots()
    # mkdocstrings calls ruff, to break long signatures into lines.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    config = load_config(str(ROOT / "mkdocs.yml"))
    config["nav"] = navigation(config["nav"], [page.file for page in reference])
    try:
        config.plugins.on_startup(command="build", dirty=False)
        mkdocs_build.build(config)
        config.plugins.on_shutdown()
    except Abort as err:
        print(
            f"build.py: the site must have no warnings, got: {err} Mend what they name.",
            file=sys.stderr,
        )
        return 1
    if found := fetches(Path(config["site_dir"])):
        print(
            "\n".join(["build.py: pages must fetch nothing from elsewhere, got:", *found]),
            file=sys.stderr,
        )
        return 1
    print(f"built {Path(config['site_dir']) / 'index.html'}")
    return 0


def fetches(site: Path) -> list[str]:
    """Elements of built pages for which a browser would ask another machine."""
    return [
        f"{page.relative_to(site)}: {found.group()}"
        for page in sorted(site.rglob("*.html"))
        for found in _FETCHED.finditer(page.read_text())
    ]


if __name__ == "__main__":
    sys.exit(main())
