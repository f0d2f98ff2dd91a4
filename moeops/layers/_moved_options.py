"""Options that layers had before the records of ``moeops.dispatch``, and that somebody still passes to a layer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

from moeops.dispatch.options import DISPATCHES

_P = ParamSpec("_P")


def refuse_moved_options(init: Callable[_P, None]) -> Callable[_P, None]:
    """Decorator of a layer's constructor: an option of a dispatch record among its arguments is one clear error."""
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def build(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                _refuse_option(type(args[0]).__name__, name, kwargs)
        init(*args, **kwargs)

    return build


def _refuse_option(op: str, name: str, given: Any) -> None:
    """Say which record has an option of this name; nothing where none has."""
    records = {
        kind: record
        for kind, record in DISPATCHES.items()
        if name in {field.name for field in dataclasses.fields(record) if field.compare}
    }
    if records:
        wanted = given.get("dispatch")
        fitting = [r for kind, r in records.items() if wanted == kind or type(wanted) is r]
        record = (fitting or list(records.values()))[0]
        raise TypeError(
            f"{op}: {name} must be an option of the dispatch record, got {name}={given[name]!r} as an argument. Pass "
            f"dispatch=moeops.dispatch.{record.__name__}({name}=...)."
        )
