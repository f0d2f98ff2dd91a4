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
        names: what Griffe shall show, dotted, in the order of the page.
        elsewhere: public names of the module that another page has, with that page's module.
    """

    module: str
    names: list[str]
    elsewhere: dict[str, str]

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
        for page in dict.fromkeys(self.elsewhere.values()):
            here = [f"`{name}`" for name, other in self.elsewhere.items() if other == page]
            lines.append(f"In [{page}]({page}.md): {', '.join(here)}.\n")
        lines += [f"::: {name}\n" for name in self.names]
        return "\n".join(lines)


# In the order of the navigation.
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
    "moeops.integrations.fmoe.convert",
    "moeops.integrations.megatron",
    "moeops.integrations.peft",
    "moeops.integrations.torchtitan",
    "moeops.integrations.transformers",
)
# Pages that others leave a name to: the first of these that exports the same object has it.
OWNERS = ("moeops.layers", "moeops.losses", "moeops.gates", "moeops.dispatch", "moeops.distributed")


def pages() -> list[Page]:
    """The page of every module.

    Raises:
        ValueError: ``MODULES`` misses an integration, or names a module that is not there.
    """
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
    names = {module: _names(module) for module in MODULES}
    made = []
    for module in MODULES:
        elsewhere = {
            name: owner
            for name, origin in names[module].items()
            if module in ("moeops", *OWNERS)
            and (owner := next((o for o in OWNERS if names[o].get(name) == origin), module))
            != module
        }
        shown = [
            _directive(module, name, origin)
            for name, origin in names[module].items()
            if name not in elsewhere
        ]
        made.append(Page(module, shown, elsewhere))
    return made


def _directive(module: str, name: str, origin: str) -> str:
    """The name as users write it, but where Griffe would take the module of the same name for it."""
    package = origin.rpartition(".")[0]
    return f"{package}.{name}" if package.rpartition(".")[2] == name else f"{module}.{name}"


def _file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.exists()), None)


def _names(module: str) -> dict[str, str]:
    """Public names of a module and where each is defined: ``__all__`` without modules, or what the file defines."""
    path = _file(module)
    if path is None:
        raise ValueError(
            f"api_pages: MODULES must name modules of moeops, got {module!r}. Mend it there."
        )
    body = ast.parse(path.read_text()).body
    exported = next((ast.literal_eval(node.value) for node in body if _assigns_all(node)), None)
    if exported is None:
        exported = [
            node.name
            for node in body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
    origins = {name: _origin(module, name) for name in exported}
    return {name: origin for name, origin in origins.items() if _file(origin) is None}


def _assigns_all(node: ast.stmt) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def _origin(module: str, name: str) -> str:
    """Dotted name of the definition: through ``from X import name`` as far as it goes."""
    path = _file(module)
    for node in ast.walk(ast.parse(path.read_text())) if path else ():
        if not isinstance(node, ast.ImportFrom) or node.module in (None, module):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return _origin(node.module, alias.name)
    return f"{module}.{name}"
