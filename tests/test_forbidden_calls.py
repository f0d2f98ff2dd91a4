"""The library runs no text as code, unpickles nothing, and starts no shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "moeops"
CALLS = ("eval", "exec", "execfile", "__import__")
MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve")
METHODS = (("os", "system"), ("os", "popen"), ("subprocess", "getoutput"), ("torch", "load"))
# The one loop that Numba needs as text; see its docstring.
ALLOWED = [("numba/_loops.py", "define", "exec")]


def forbidden(tree: ast.Module) -> list[tuple[str, str]]:
    """Function and name of every forbidden use in a module."""
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Import):
            found.extend((function, a.name) for a in node.names if a.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            found.append((function, node.module))
        if isinstance(node, ast.Call):
            target = node.func
            named = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if isinstance(target, ast.Name) and target.id in CALLS:
                found.append((function, target.id))
            if named.get("shell", "False") != "False":
                found.append((function, "shell"))
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                pair = (target.value.id, target.attr)
                if pair in METHODS and named.get("weights_only") != "True":
                    found.append((function, ".".join(pair)))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree, "")
    return found


def test_library():
    files = sorted(LIBRARY.rglob("*.py"))
    assert len(files) > 50
    found = [
        (str(file.relative_to(LIBRARY)), *use)
        for file in files
        for use in forbidden(ast.parse(file.read_text(), str(file)))
    ]
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("eval(text)", "eval"),
        ("exec(code, names)", "exec"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("os.system(command)", "os.system"),
        ("subprocess.run(command, shell=True)", "shell"),
        ("torch.load(path)", "torch.load"),
    ],
)
def test_every_use_is_found(line, name):
    assert forbidden(ast.parse(f"def f():\n    {line}")) == [("f", name)]


def test_what_is_harmless_is_not_found():
    text = "model.eval()\ntorch.load(path, weights_only=True)\nsubprocess.run(c, shell=False)"
    assert forbidden(ast.parse(text)) == []
