"""The docstrings of moeops for the site's reference: habits of theirs that Griffe does not know.

Griffe loads this file as an extension, by ``mkdocs.yml``. Several errors may stand in one line of ``Raises:``, lines
such as ``Gradients: x.  Host sync: none.`` close a docstring, arguments with the same meaning share an entry of
``Args:``, and the section of examples is ``Example:``.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NEXT_ERROR = re.compile(r"(?<=[.;)])\s+(?=[A-Z]\w*(?:Error|Exception|Warning): )")
_FACT = r"(?:Gradients?|Host syncs?|Deterministic|Cost|Source|Compiled|Memory|Collectives?|Wire)"
_FACTS = re.compile(rf"^{_FACT}: .*(?:\n(?!\s*\n)(?![A-Z]\w*:$)\S.*)*", re.MULTILINE)
_SPLIT_NAMES = re.compile(r"^(    \w+(?:, \w+)*,)\n\s+(?=\w+(?:, \w+)*: )", re.MULTILINE)
_NEXT_FACT = re.compile(rf"(?<=[.;)])\s+(?={_FACT}: )")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once per object of the package, after its members."""
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
    """One error per entry of ``Raises:``, one list entry per fact, and what else Griffe expects."""
    text = re.sub(r"(?m)^Example:$", "Examples:", text)
    text = re.sub(r"(?m)^ *\.\. code-block:: \w+\n|(?<=:):$", "", text)
    text = _SPLIT_NAMES.sub(r"\1 ", text)
    text = re.sub(r"(?m)^Raises:\n(?:[ ]+\S.*\n?)+", lambda found: _errors(found.group()), text)
    return _FACTS.sub(lambda found: _as_list(found.group()), text)


def _errors(section: str) -> str:
    title, _, body = section.partition("\n")
    indent = re.match(r" *", body).group()
    entries = _NEXT_ERROR.split(re.sub(r"\s+", " ", body).strip())
    return "\n".join([title, *(indent + entry for entry in entries), ""])


def _as_list(facts: str) -> str:
    entries = _NEXT_FACT.split(re.sub(r"\s+", " ", facts).strip())
    lines = [re.sub(r"^([^:]+):", r"- **\1**:", entry) for entry in entries]
    return "\n" + "\n".join(lines) + "\n"
