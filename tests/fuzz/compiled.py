"""Cases of ops and layers in one graph of ``torch.compile``, against the truth of the eager ones."""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from fuzz import layers, ops

WHAT = {"ops": ops, "layers": layers}


def draw(rng: Random) -> dict[str, Any]:
    what = rng.choice(tuple(WHAT))
    options = WHAT[what].draw(rng)
    if what == "ops":
        options["through_func"] = None
    else:
        options["recomputed"] = False
        if options["kind"] in ("modules", "nested"):
            # torch compiles no backward of nn.Linear(1, H) on rows whose number is data, with moeops or without.
            options["D"] = max(options["D"], 2)
    return {"what": what, "backend": "inductor" if rng.random() < 0.05 else "aot_eager", **options}


def check(seed: int, *, what: str, **options: Any) -> None:
    """A case of ``what``, compiled."""
    with torch._inductor.config.patch(fallback_random=True):
        WHAT[what].check(seed, **options)
