"""Write docs/errors.md: every error message in the code, with the type that carries it.

    python scripts/list_errors.py           # write the file
    python scripts/list_errors.py --check   # exit code 1 where the file is not what the code says

A message is what an exception is made with, in Python, and what ``STD_TORCH_CHECK`` prints, in C++ and CUDA. What
differs from call to call stands in braces, by the name that it has in the code.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# Errors

Every error message of moeops, written from the code by `python scripts/list_errors.py`: search this page for the words
that your error has. Words in braces differ from call to call and have the name that they have in the code; the others
stand as they are. A message reads `<op>: <argument> must be <requirement>, got <what was got>. <what to do>`.

- `ValueError`: a value or a shape. `TypeError`: a type, torch's or Python's. `RuntimeError`: the machine, the build, or
  other ranks. `NotImplementedError`: it would make sense, and nobody has written it.
- An error of a collective names op, group and time-out: [distributed.md](distributed.md#when-a-rank-fails).
- "as before" repeats another error, with its type, and adds whose argument it was.
- Bare ops, `torch.ops.moeops.*`, check again in C++ what would corrupt memory, and raise `RuntimeError` for all of it,
  which begins with the place in the source.
- "RuntimeError in a graph" comes while torch traces: sizes are symbols there, so the message has no numbers.

"""
# Functions whose second argument, or first, becomes an error's text.
CHECKS = {"fake_check": 1, "_check": 1}
NO_ERRORS = ("AssertionError", "KeyError", "StopIteration", "SyntaxError")


def messages_of(file: Path) -> Iterator[tuple[str, str]]:
    """Type and message of every error that a Python file makes, in the order of the file."""
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    scopes: dict[ast.AST, dict[str, str]] = {}

    def visit(node: ast.AST, words: dict[str, str]) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            words = scopes.setdefault(node, {**words, **_texts_by_name(node)})
        if isinstance(node, ast.Call) and (found := _error(node)):
            kind, argument = found
            text = template(argument, words)
            if text is not None and " " in text:
                yield kind, text
        for child in ast.iter_child_nodes(node):
            yield from visit(child, words)

    yield from visit(tree, _texts_by_name(tree))


def _error(node: ast.Call) -> tuple[str, ast.expr] | None:
    """Type and message of a call that makes or checks for an error."""
    name = ast.unparse(node.func).rpartition(".")[2]
    if name in CHECKS and len(node.args) > CHECKS[name]:
        argument = node.args[CHECKS[name]]
        argument = argument.body if isinstance(argument, ast.Lambda) else argument
        return "RuntimeError in a graph", argument
    if ast.unparse(node.func) == "type(err)" and node.args:
        return "as before", node.args[0]
    is_error = name.endswith("Error") and name[0].isupper() and name not in NO_ERRORS
    return (name, node.args[0]) if is_error and node.args else None


def _texts_by_name(scope: ast.AST) -> dict[str, str]:
    """Variables of a function, or of a module, that are assigned once, and a text."""
    found: dict[str, list[str | None]] = {}
    nodes = scope.body if isinstance(scope, ast.Module) else ast.walk(scope)
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(template(node.value, {}))
    return {n: texts[0] for n, texts in found.items() if len(texts) == 1 and texts[0] is not None}


def template(node: ast.expr, words: dict[str, str]) -> str | None:
    """A text with its variable parts in braces; ``None`` where the node is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(value.value) if isinstance(value, ast.Constant) else _part(value.value, words)
            for value in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(side, words) for side in (node.left, node.right)]
        return None if parts == [None, None] else "".join(p or "{...}" for p in parts)
    return words.get(node.id) if isinstance(node, ast.Name) else None


def _part(node: ast.expr, words: dict[str, str]) -> str:
    """A variable part in braces, as short as it can be said."""
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    while isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        node = node.args[0]
    text = ast.unparse(node).replace("self.", "")
    return "{" + (text if re.fullmatch(r"[\w.]{1,40}", text) else "...") + "}"


_CHECK = re.compile(r"\bSTD_TORCH_CHECK\(")


def native_messages_of(file: Path) -> Iterator[str]:
    """What every check of a C++ or CUDA file prints."""
    source = re.sub(r"//[^\n]*", "", file.read_text(encoding="utf-8"))
    for start in _CHECK.finditer(source):
        _, *parts = _arguments(source[start.end() :])
        text = "".join(
            "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', part))
            if part.startswith('"')
            else "{" + (part if re.fullmatch(r"\w{1,40}", part) else "...") + "}"
            for part in parts
        )
        if " " in text:
            yield text.replace('\\"', '"')


def _arguments(source: str) -> list[str]:
    """The arguments of a call, from behind its bracket on."""
    depth, parts, quoted = 0, [""], False
    for place, char in enumerate(source):
        quoted ^= char == '"' and source[place - 1] != "\\"
        if not quoted:
            depth += (char in "([{") - (char in ")]}")
            if depth < 0:
                break
            if char == "," and depth == 0:
                parts.append("")
                continue
        parts[-1] += char
    return [part.strip() for part in parts]


def sections() -> dict[str, list[tuple[str, str]]]:
    """Type and message of every error, by the part of the library that raises it."""
    found: dict[str, list[tuple[str, str]]] = {}
    package = ROOT / "moeops"
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:2]) if len(parts) > 2 else "moeops"
        found.setdefault(name, []).extend(messages_of(file))
    native = "torch.ops.moeops"
    for file in sorted(package.rglob("*")):
        if file.suffix in (".h", ".cpp", ".cu", ".cuh"):
            found.setdefault(native, []).extend(
                ("RuntimeError", m) for m in native_messages_of(file)
            )
    return {
        name: sorted(set(errors), key=lambda e: e[::-1]) for name, errors in found.items() if errors
    }


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip()]
    for name, errors in sections().items():
        lines += ["", f"## {name}", "", "| error | message |", "|---|---|"]
        for kind, text in errors:
            shown = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
            lines.append(f"| {kind} | `{shown}` |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit code 1 where the file must be written again."""
    parser = argparse.ArgumentParser("list_errors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/errors.md is not what the code says. Write it: python scripts/list_errors.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
