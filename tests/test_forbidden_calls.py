"""The library runs no text as code, unpickles nothing that is not its own job's, and starts no shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "moeops"
CALLS = ("eval", "exec", "execfile", "compile", "__import__")
MODULES = (
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "pty",
)
FUNCTIONS = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.serialization.load", "torch.jit.load", "numpy.load", "np.load"),
}
# Methods by whatever object; collectives of objects pickle, and safe globals would let files name classes.
METHODS = {
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "add_safe_globals", "safe_globals"),
}
ALLOWED = [
    ("comm/agreement.py", "_all_gather", "all_gather_object"),  # of a job's own ranks
    ("comm/gathering.py", "check_equal_rows", "all_gather_object"),
    ("numba/_loops.py", "define", "exec"),  # the one loop that Numba needs as text; see there
    ("numba/_loops.py", "define", "compile"),
    ("planner/ranks.py", "gather", "all_gather_object"),
]


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
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
            found.extend((function, name) for name in names if name in FUNCTIONS)
        if isinstance(node, ast.Call):
            target = node.func
            named = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if isinstance(target, ast.Name) and target.id in CALLS:
                found.append((function, target.id))
            if named.get("shell", "False") != "False":
                found.append((function, "shell"))
            dotted = ast.unparse(target)
            if dotted in FUNCTIONS and named.get("weights_only") != "True":
                found.append((function, dotted))
            if dotted.rpartition(".")[2] in METHODS:
                found.append((function, dotted.rpartition(".")[2]))
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
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("torch.load(path, weights_only=trusted)", "torch.load"),
        ("torch.jit.load(path)", "torch.jit.load"),
        ("np.load(path, allow_pickle=True)", "np.load"),
        ("from torch import load", "torch.load"),
        ("from os import system", "os.system"),
        ("compile(text, name, 'exec')", "compile"),
        ("dist.broadcast_object_list(x)", "broadcast_object_list"),
        ("torch.serialization.add_safe_globals([Config])", "add_safe_globals"),
    ],
)
def test_every_use_is_found(line, name):
    assert forbidden(ast.parse(f"def f():\n    {line}")) == [("f", name)]


def test_what_is_harmless_is_not_found():
    text = "model.eval()\ntorch.compile(f)\nre.compile(p)\ntorch.load(path, weights_only=True)\n"
    text += "subprocess.run(c, shell=False)"
    assert forbidden(ast.parse(text)) == []
