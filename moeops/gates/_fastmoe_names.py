"""FastMoE's names of arguments, in the gates that FastMoE has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def accept_fastmoe_names(init: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a constructor: ``topk``, as FastMoE calls it, is taken for ``top_k``."""

    @functools.wraps(init)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        if "topk" in kwargs:
            if "top_k" in kwargs:
                raise TypeError(
                    f"{type(self).__name__}: top_k must be given once, got topk too. Drop topk."
                )
            kwargs["top_k"] = kwargs.pop("topk")
        init(self, *args, **kwargs)

    return build
