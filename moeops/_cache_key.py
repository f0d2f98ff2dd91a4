"""Keep torch's caches from handing out code that was compiled with other versions of moeops' ops.

A compiled graph calls what gradients and decompositions call, and torch's caches on disk know the graph by the names of
its ops alone. After an upgrade they would return backwards that call ops which are gone, or have mended faults.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from moeops._imports import when_imported

# Packages whose files say what becomes of an op in a graph.
_PACKAGES = ("ops", "comm", "dispatch")


def tag_caches() -> None:
    """Have the keys of torch's caches hold a digest of moeops' ops, from the import of the caches on."""
    when_imported("torch._inductor.codecache", lambda _: _add_tag())


def _add_tag() -> None:
    config = torch.compiler.config
    if (own := f"moeops-{digest()}") not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {own}".strip()


def digest() -> str:
    """Of the files that register ops, the same on every machine."""
    found = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(path for name in _PACKAGES for path in (root / name).glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
