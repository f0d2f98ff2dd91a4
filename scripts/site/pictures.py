"""How every picture of the site is drawn and saved: the same file from the same numbers, on any machine."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

OURS, LIMIT = "#00796b", "#b0bec5"
OTHERS = ("#ef6c00", "#8d6e63", "#5c6bc0", "#c2185b")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text: small files, found by the browser's search
    "svg.hashsalt": "moeops",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # what matplotlib brings along and measures text with
}


def new_figure(width: float, height: float) -> Figure:
    """A figure of ``width`` x ``height`` inches on white, whose parts do not overlap."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, path: Path) -> None:
    """Write an SVG without date and random ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def styled():
    """The style as a context, which leaves the settings of the process alone."""
    return matplotlib.rc_context(STYLE)
