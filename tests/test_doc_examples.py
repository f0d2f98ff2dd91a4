"""Examples of README, docs/ and docstrings: those that stand alone run, and what they call is there."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import moeops
from moeops.distributed.checkpoint.files import FORMAT

HAS_NUMBA = importlib.util.find_spec("numba") is not None
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Page, number of the example, and what it is given. README's first and those of docs/ops.md have tests of their own.
ALONE = [
    ("README.md", 1, {}),
    ("README.md", 2, {}),
    ("docs/fsmoe.md", 0, {}),
    ("docs/gates.md", 0, {}),
    ("docs/numba.md", 0, {"logits": torch.linspace(-1, 1, 20).view(5, 4)}),
    ("docs/tools.md", 0, {}),
]


def examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_is_python(page):
    for code in examples(page):
        compile(code, page.name, "exec")


@pytest.mark.parametrize(("page", "number", "given"), ALONE, ids=lambda value: str(value)[:16])
def test_an_example_that_stands_alone_runs(page, number, given):
    code = examples(ROOT / page)[number]
    if "moeops.numba" in code:
        pytest.importorskip("numba")
    torch.manual_seed(0)
    exec(compile(code, page, "exec"), dict(given))


def test_the_examples_of_the_readme_have_ten_lines():
    lengths = [len(code.strip().splitlines()) for code in examples(ROOT / "README.md")[:3]]
    assert len(lengths) == 3
    assert max(lengths) <= 10


def test_the_readme_has_two_commands():
    (block,) = re.findall(
        r"^## Two commands\n.*?^```\n(.*?)^```",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert block.splitlines() == ["make train", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_moeops_are_there(page):
    """Every ``moeops.a.b`` is a module or a name in one; integrations need other projects, so their files are there."""
    for name in set(re.findall(r"(?<![\w.\"'/])moeops(?:\.[A-Za-z]\w*)+", page.read_text())):
        if name.startswith("moeops.integrations."):
            path = ROOT.joinpath(*name.split(".")[:3])
            assert path.is_dir() or path.with_suffix(".py").exists(), name
        elif name != FORMAT and (not name.startswith("moeops.numba.") or HAS_NUMBA):
            assert exists(name), name


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ModuleNotFoundError):
        return False
    return True


# Integrations need other projects, and moeops.integrations.fmoe changes what `import fmoe` means in a process.
MODULES = sorted(
    module.name
    for module in pkgutil.iter_modules(moeops.__path__, "moeops.")
    if module.name.rpartition(".")[2] not in ("__main__", "_C", "integrations")
    and not module.name.startswith("moeops.lib")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_give_what_they_say(name):
    if name == "moeops.numba":
        pytest.importorskip("numba")
    top = importlib.import_module(name)
    inner = pkgutil.walk_packages(getattr(top, "__path__", []), f"{name}.")
    finder, report = doctest.DocTestFinder(), []
    known = {
        "torch": torch,
        "nn": torch.nn,
        "moeops": moeops,
        **{n: getattr(moeops, n) for n in moeops.__all__},
    }
    for module in [top, *(importlib.import_module(module.name) for module in inner)]:
        for test in finder.find(module, module.__name__):
            test.globs = known | test.globs
            torch.manual_seed(0)
            doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)
