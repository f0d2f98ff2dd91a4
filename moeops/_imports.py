"""Run something when a module of torch is imported that few programs need and that takes its time."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, function: Callable[[ModuleType], object]) -> None:
    """Call ``function(module)`` now if the module is there, otherwise as soon as somebody has imported it."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, function))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls a function when its code has run."""

    def __init__(self, name: str, function: Callable[[ModuleType], object]) -> None:
        self.name = name
        self.function = function

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                return self._calling(spec)
        return None

    def _calling(self, spec: ModuleSpec) -> ModuleSpec:
        loader = spec.loader
        assert loader is not None
        run = loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            self.function(module)

        loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec
