"""Pages of the API reference: every public name of every public module, with its signature and docstring.

The names are read from the sources (``__all__``, or what a module defines), so that a page needs neither a GPU nor the
projects that integrations are for.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Page(NamedTuple):
    """One page of the reference.

    Attributes:
        module: dotted name.
        names: public names in the order of the page; none for a module whose docstring says all.
    """

    module: str
    names: list[str]

    @property
    def file(self) -> str:
        """Where it lies below the site's pages."""
        return f"api/{self.module}.md"

    def text(self) -> str:
        """Markdown with the directives that mkdocstrings fills in."""
        lines = [
            f"# {self.module}\n",
            f"::: {self.module}\n    options:\n      members: []\n      show_root_heading: false\n"
            "      show_root_toc_entry: false\n",
        ]
        lines += [f"::: {self.module}.{name}\n" for name in self.names]
        return "\n".join(lines)


# In the order of the navigation. Names of moeops itself that have a page of their own are left out there.
MODULES = (
    "moeops",
    "moeops.layers",
    "moeops.gates",
    "moeops.losses",
    "moeops.dispatch",
    "moeops.distributed",
    "moeops.compile",
    "moeops.numba",
    "moeops.numba.scores",
    "moeops.reference",
    "moeops.cost.pipeline",
    "moeops.integrations.fmoe",
    "moeops.integrations.megatron",
    "moeops.integrations.peft",
    "moeops.integrations.torchtitan",
    "moeops.integrations.transformers",
)


def pages() -> list[Page]:
    """The pages of all modules that are there.

    Raises:
        ValueError: a module of ``moeops`` that the reference should have is missing from ``MODULES``.
    """
    found = [(name, path) for name in MODULES if (path := _file(name)) is not None]
    integrations = {
        f"moeops.integrations.{path.stem}"
        for path in (ROOT / "moeops" / "integrations").iterdir()
        if not path.name.startswith("_")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    if missing := sorted(integrations - set(MODULES)):
        raise ValueError(
            f"api_pages: MODULES must name every integration, got none of {missing}. Add them there."
        )
    return [Page(name, _names(name, path)) for name, path in found]


def _file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.exists()), None)


def _names(module: str, path: Path) -> list[str]:
    """``__all__`` without modules; where there is none, the functions and classes that the file defines."""
    tree = ast.parse(path.read_text())
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    ]
    if exported:
        return [name for name in exported[0] if _file(f"{module}.{name}") is None]
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
